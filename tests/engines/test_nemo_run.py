"""examples/nemo_run: its plans, and its runs on this host and on a cluster of four nodes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing, wait_until

from megatron_aspo.journal.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
NEMO_RUN = ROOT / ".venv-nemo-run/bin/python"
SHORT = ["warmup.updates=5", "rollout.prompts_per_step=8", "eval.every=0"]

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.skipif(not NEMO_RUN.exists(), reason="no NeMo-Run: make nemo-run"),
]

Aspo = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the current code, all committed: jobs are sent the committed files."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("megatron_aspo", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".gitignore").write_text("runs/\n/data/\n__pycache__/\n")
    (folder / "data").mkdir()
    (folder / "data" / "deepscaler.json").write_text('[{"problem": "1 + 1", "answer": "2"}]')
    user = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "--quiet"], ["add", "."], [*user, "commit", "--quiet", "--message=all of it"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def aspo(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Aspo:
    """Run the example's command line."""
    home = tmp_path_factory.mktemp("nemo_run_home").parent / "home"

    def aspo(*words: str, settings: list[str] | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [NEMO_RUN, "examples/nemo_run/aspo.py", *words, "--yes", f"settings={settings or []}".replace("'", '"')],
            cwd=checkout,
            env={**os.environ, "NEMORUN_HOME": str(home), "PYTHON": sys.executable, "COLUMNS": "2000", **environment},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )

    return aspo


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


def train_steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run_dir) if record["phase"] == "train"]


@pytest.mark.parametrize(("name", "nodes"), [("qwen2_5_32b", "4"), ("qwen3_235b_a22b_async", "32")])
def test_dry_run_of_a_recipe(aspo: Aspo, checkout: Path, name: str, nodes: str) -> None:
    settings = ["loss.clip_high=0.28", "name=planned"]
    done = aspo("--factory", name, "--dryrun", "run.executor=slurm", settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    flags = dict(re.findall(r"#SBATCH --([a-z-]+)=(\S+)", done.stdout))
    expected = {"job-name": "planned.train", "nodes": nodes, "ntasks-per-node": "8", "gpus-per-node": "8"}
    assert expected.items() <= flags.items()
    recipe = f"examples/{name}.yaml checkpoint.resume=auto loss.clip_high=0.28 name=planned"
    data = f"data.path={checkout}/data/deepscaler.json"  # no commit has it
    words = f"{recipe} output_dir={checkout}/runs {data}"
    assert f"exec {sys.executable} -m megatron_aspo.commands.train {words}" in done.stdout
    for variable in (
        *("CUDA_DEVICE_MAX_CONNECTIONS:-1", "NVTE_FWD_LAYERNORM_SM_MARGIN:-16", "NCCL_DEBUG:-WARN"),
        *("PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True", f"HF_HOME:-{checkout}/.cache/huggingface"),
        f"VLLM_CACHE_ROOT:-{checkout}/runs/planned/cache/vllm",
    ):
        assert f"export {variable.partition(':')[0]}=${{{variable}}}\n" in done.stdout
    assert not (checkout / "runs").exists()


def test_dry_run_in_a_container(aspo: Aspo, checkout: Path) -> None:
    flags = ["run.executor=slurm_container", "run.executor.container_image=aspo.sqsh", "run.executor.account=me"]
    data = ["data.path=data/**.json"]
    done = aspo("--factory", "qwen2_5_32b", "--dryrun", "nodes=8", *flags, settings=data)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "#SBATCH --nodes=8" in done.stdout
    assert "#SBATCH --account=me" in done.stdout
    (step,) = re.findall(r"^\s+(srun --output.*?)\s*$", done.stdout, re.MULTILINE)
    mounts = re.search(r"--container-mounts (\S+)", step)
    assert "--container-image aspo.sqsh" in step
    assert "--no-container-mount-home" in step
    assert mounts is not None
    folders = [f"{checkout}/{name}" for name in ("runs", ".cache/huggingface", "data")]
    assert mounts[1].startswith(",".join(f"{folder}:{folder}" for folder in folders))
    assert "*" not in mounts[1]
    assert f"data.path={checkout}/data/**.json" in done.stdout.replace("'", "")
    assert "exec python -m megatron_aspo.commands.train" in done.stdout


def test_a_mistake_is_told_before_anything_starts(aspo: Aspo, checkout: Path) -> None:
    done = aspo("--factory", "tiny", settings=["loss.clip_hgh=0.3"])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "megatron-aspo: unknown setting loss.clip_hgh; did you mean loss.clip_high?"
    assert not (checkout / "runs").exists()


def test_local(aspo: Aspo, checkout: Path) -> None:
    done = aspo("--factory", "tiny", settings=[*SHORT, "name=local", "train.steps=2"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert train_steps(checkout / "runs/local") == [1, 2]
    assert (checkout / "runs/local/report.html").exists()


def test_ranks_that_fail_are_told_by_the_exit_code(aspo: Aspo) -> None:
    done = aspo("--factory", "tiny", settings=["name=failing", "data.task=no_such_task"])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no_such_task" in done.stdout + done.stderr


@pytest.mark.long
def test_slurm_and_a_signal(aspo: Aspo, checkout: Path, cluster: Cluster) -> None:
    """Two ranks on each of two nodes: after the stop signal they save, and the job resumes at that step."""
    settings = [*SHORT, "name=nodes", "train.steps=8", "checkpoint.every=0"]
    words = ["--detach", "run.executor=slurm", "nodes=2", "ranks_per_node=2"]
    done = aspo("--factory", "tiny", *words, settings=settings, **cluster.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = cluster.call("squeue", "-h", "-o", "%i").split()

    def field(name: str) -> str:
        return cluster.field(job, name)

    def said() -> str:
        folder = Path(field("StdOut")).parent
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.out")))

    def is_over() -> bool:
        return field("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    run_dir = checkout / "runs/nodes"
    wait_until(lambda: is_over() or ((run_dir / "metrics.jsonl").exists() and 2 in train_steps(run_dir)), 600, said)
    cluster.call("scancel", "--signal=USR1", job)
    wait_until(is_over, 600, said)
    assert field("JobState") == "COMPLETED", said()
    assert field("Restarts") == "1"
    assert "stopped by a signal: step" in said()
    assert train_steps(run_dir) == list(range(1, 9))
