"""slurm/ without Slurm: the output of a dry run."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_aspo.commands.arguments import MODULES
from megatron_aspo.commands.node_check import SILENCE, blame, host_threads, rank_environment, reasons
from megatron_aspo.config.load import load_config

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "aspo_32b": 4,
    "aspo_32b_async": 8,
    "aspo_72b": 8,
    "aspo_80b_a3b": 4,
    "aspo_106b": 8,
    "aspo_235b_a22b": 16,
    "aspo_235b_a22b_async": 32,
    "aspo_671b": 32,
}


def dry_run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.run(
        ["bash", f"slurm/{script}.sh", *words],
        cwd=ROOT,
        env={**kept, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands(script: str) -> None:
    done = dry_run(script, "loss.clip_high=0.28", HF_TOKEN="a secret")
    assert done.returncode == 0, done.stderr
    check, train = (shlex.split(line) for line in done.stdout.splitlines())
    nodes = SCRIPTS[script]
    assert {f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"} <= set(check)
    assert {f"--nodes={nodes}", f"--ntasks={8 * nodes}", "--ntasks-per-node=8"} <= set(train)
    assert "--distribution=block:block" in train
    waits = [[word for word in command if word.startswith("--wait=")][-1] for command in (check, train)]
    assert waits == ["--wait=0", "--wait=120"]  # the check has its own patience
    (recipe,) = re.findall(r"^RECIPE=.*:-(\w+)", (ROOT / f"slurm/{script}.sh").read_text(), re.MULTILINE)
    name = load_config(ROOT / f"examples/{recipe}.yaml").name
    assert train[-4:] == [f"name={name}", "output_dir=runs", "checkpoint.resume=auto", "loss.clip_high=0.28"]
    assert f"--output={ROOT}/runs/{name}/logs/0-0/node%n-rank%t.log" in train
    assert not any("container" in word for word in train)
    assert "secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "job_name", "name"),
    [
        ([], "aspo-32b", "qwen2_5_32b"),
        (["RECIPE=tiny"], "aspo-32b", "tiny"),  # a smoke test and the run after it have two folders
        (["RECIPE=tiny"], "mine", "mine"),
        (["RECIPE=tiny", "name=other"], "mine", "other"),
    ],
)
def test_a_run_is_named_by_its_job_or_its_recipe(words: list[str], job_name: str, name: str) -> None:
    for line in dry_run("aspo_32b", *words, SLURM_JOB_NAME=job_name).stdout.splitlines():
        assert f"name={name}" in shlex.split(line)
        assert f"--output={ROOT}/runs/{name}/logs/" in line


@pytest.mark.parametrize("named", ["name: 'mine'  # x", 'name:   "mine"', "name: mine # x", "name: # x", "seed: 1"])
def test_a_name_is_read_from_a_file_of_the_users(named: str, tmp_path: Path) -> None:
    """A file without a name has its own."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"# name: no\n{named}\ndata:\n  name: no\n")
    assert " name=mine " in dry_run("aspo_32b", f"RECIPE={recipe}").stdout
    recipe.write_text(f"{named}\noutput_dir: '/scratch/me'\n")
    line = dry_run("aspo_32b", f"RECIPE={recipe}").stdout
    assert " name=mine output_dir=/scratch/me " in line
    assert "--output=/scratch/me/mine/logs/" in line
    recipe.write_text(f'{named}\noutput_dir: "/scratch/my group"  # large\n')
    for command in dry_run("aspo_32b", f"RECIPE={recipe}").stdout.splitlines():
        assert "output_dir=/scratch/my group" in shlex.split(command)


@pytest.mark.parametrize("field", ["name: ${oc.env:USER}", "output_dir: ${oc.env:X}/runs", 'output_dir: "a\\x20b"'])
def test_a_name_that_only_python_resolves_is_refused(field: str, tmp_path: Path) -> None:
    """Else the script would look for the run's checkpoints and signals in a folder of another name."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"{field}\n")
    done = dry_run("aspo_32b", f"RECIPE={recipe}")
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    assert f"give {field.partition(':')[0]}=" in line
    assert dry_run("aspo_32b", f"RECIPE={recipe}", "name=mine", "output_dir=/scratch").returncode == 0


def test_another_command_gets_its_options_and_the_node_check_settings_alone() -> None:
    words = ["COMMAND=eval", "--benchmark", "aime24=data/aime24.parquet", "rollout.temperature=1"]
    check, run = (shlex.split(line) for line in dry_run("aspo_32b", *words).stdout.splitlines())
    named = ["name=qwen2_5_32b", "output_dir=runs"]
    assert check[-4:] == ["examples/qwen2_5_32b.yaml", *named, words[-1]]
    arguments = ["examples/qwen2_5_32b.yaml", *words[1:-1], *named, words[-1]]
    assert run[-7:] == ["megatron_aspo.commands.evaluate", *arguments]
    words = ["COMMAND=export", "seed=2", "parallel.tensor=8", "exported"]  # the folder comes before all settings
    run = shlex.split(dry_run("aspo_32b", *words).stdout.splitlines()[1])
    assert run[-6:] == ["examples/qwen2_5_32b.yaml", "exported", *named, "seed=2", "parallel.tensor=8"]
    options = dry_run("aspo_32b", "--checkpoint", "base", "COMMAND=eval")  # in any order
    assert options.returncode == 0
    for command in MODULES:
        *_, run = (shlex.split(line) for line in dry_run("aspo_32b", f"COMMAND={command}").stdout.splitlines())
        assert f"megatron_aspo.commands.{MODULES[command]}" in run


def test_a_container() -> None:
    words = ("CONTAINER=/images/aspo.sqsh", "CONTAINER_MOUNTS=/data:/data", "name=mine", "output_dir=/scratch")
    done = dry_run("aspo_32b", *words, HF_HOME="/hf")
    for command in (shlex.split(line) for line in done.stdout.splitlines()):
        (mounts,) = (word.partition("=")[2] for word in command if word.startswith("--container-mounts="))
        assert mounts == f"{ROOT}:{ROOT},/scratch/mine:/scratch/mine,/hf:/hf,/data:/data"
        assert "--container-image=/images/aspo.sqsh" in command
        assert f"--container-workdir={ROOT}" in command
        assert "--no-container-mount-home" in command
        assert "python" in command  # the container's python


def test_torchrun() -> None:
    done = dry_run("aspo_32b", "LAUNCHER=torchrun", "RECIPE=tiny")
    train = shlex.split(done.stdout.splitlines()[1])
    assert {"--ntasks=4", "--ntasks-per-node=1", "torch.distributed.run", "examples/tiny.yaml"} <= set(train)
    assert train[train.index("--nproc-per-node") + 1] == "8"


@pytest.mark.parametrize("path", ["slurm/body.sh", "examples/nemo_run/aspo.py"])
def test_the_master_port_is_none_that_linux_hands_out(path: str) -> None:
    """Linux uses ports 32768 to 60999 for outgoing connections, and reserves those below 1024."""
    (formula,) = re.findall(r"MASTER_PORT=\S*?\$\(\(([^()]*)\)\)", (ROOT / path).read_text(encoding="utf-8"))
    loop = f"for ((job = 0; job < 100000; job++)); do JOB=$job SLURM_JOB_ID=$job; echo $(({formula})); done"
    done = subprocess.run(["bash", "-euc", loop], capture_output=True, text=True, check=True)
    ports = [int(line) for line in done.stdout.split()]
    assert len(ports) == 100000
    assert 1024 <= min(ports) <= max(ports) < 32768
    assert all(port != following for port, following in itertools.pairwise(ports))


@pytest.mark.parametrize(
    ("words", "environment", "named"),
    [
        (["LAUNCHER=mpirun"], {}, "LAUNCHER=mpirun"),
        (["RECIPE=tiniest"], {}, "RECIPE=tiniest"),
        (["RECIPPE=tiny"], {}, "RECIPPE=tiny"),
        (["MAX_CRASHES=few"], {}, "MAX_CRASHES=few"),
        (["SLURM_WAIT=08"], {}, "SLURM_WAIT=08"),
        (["RECIPE=tiny", "--nodes=2"], {}, "--nodes=2"),
        (["COMMAND=evaluate"], {}, "COMMAND=evaluate"),
        ([], {"DRY_RUN": "0"}, "DRY_RUN=1"),
        ([], {"SLURM_SUBMIT_DIR": "/tmp"}, "ASPO_ROOT"),
    ],
)
def test_mistakes(words: list[str], environment: dict[str, str], named: str) -> None:
    done = dry_run("aspo_32b", *words, **environment)
    assert (done.returncode, done.stderr) == (2, "")
    (line,) = done.stdout.splitlines()
    assert named in line


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_kernels_are_cached_on_the_node(launcher: str, tmp_path: Path) -> None:
    """The cache is in the node's temporary folder, which may differ from that of the submitting machine."""
    line = dry_run("aspo_32b", f"LAUNCHER={launcher}").stdout.splitlines()[1]
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True).stdout
    train = words.split("\0")
    start = train[train.index("-c") + 1]
    for variable, folder in {str(tmp_path): str(tmp_path), str(tmp_path / "elsewhere"): "/tmp", "": "/tmp"}.items():
        environment = {"TMPDIR": variable, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
        command = ["bash", "-c", start, "start", "bash", "-c", "echo $TRITON_CACHE_DIR $FLASHINFER_WORKSPACE_BASE"]
        environment["PATH"] = os.environ["PATH"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{folder}/triton-{os.getuid()}-7 {folder}/flashinfer-{os.getuid()}\n"


def test_the_documentation_has_every_setting_and_what_the_scripts_ask_for() -> None:
    text = (ROOT / "docs/slurm.md").read_text()
    body = (ROOT / "slurm/body.sh").read_text()
    (known,) = re.findall('^KNOWN="(.*)"$', body, re.MULTILINE)
    settings = text.partition("| setting |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", settings, re.MULTILINE) == known.split()
    rows = re.findall(r"^\| `slurm/(\w+)\.sh` \| `(\w+)` \| (\d+) \| (\d+) min \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == list(SCRIPTS)
    for script, recipe, nodes, minutes in rows:
        lines = (ROOT / f"slurm/{script}.sh").read_text()
        assert f"RECIPE=${{RECIPE:-{recipe}}}\n" in lines
        assert f"#SBATCH --nodes={nodes}\n" in lines
        assert f"#SBATCH --signal=B:USR1@{60 * int(minutes)}\n" in lines
        cluster = load_config(ROOT / f"examples/{recipe}.yaml").cluster
        assert cluster is not None
        assert (cluster.nodes, cluster.gpus_per_node) == (int(nodes), 8)


def test_the_ranks_environment_goes_by_layout_and_gpu() -> None:
    config = load_config(ROOT / "examples/tiny.yaml")
    assert rank_environment(config.parallel, (9, 0))["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in rank_environment(config.parallel, (10, 0))
    margins = {f"NVTE_{kind}_LAYERNORM_SM_MARGIN": "16" for kind in ("FWD", "BWD", "INF")}
    assert rank_environment(config.parallel, (10, 0)) == margins
    assert rank_environment(config.parallel, None) == {}
    alone = load_config(ROOT / "examples/tiny.yaml", ["parallel.tensor=1"])
    assert rank_environment(alone.parallel, (9, 0)) == {}


def test_threads_of_ranks_whose_adam_runs_on_the_host(monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    for bound, threads in ((12, 12), (96, 12)):  # whether Slurm binds the check to a rank's cores or to all
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, bound=bound: set(range(bound)))
        assert host_threads(load_config(ROOT / "examples/deepseek_v3_671b.yaml").optimizer, 8) == threads
        assert host_threads(load_config(ROOT / "examples/qwen3_32b.yaml").optimizer, 8) == 1


def test_whom_to_blame() -> None:
    names = ["a", "b", "c"]
    assert blame(names, [[], [], []]) == {}
    assert blame(names, [[], ["low sum", "no peer"], []]) == {"b": "low sum; no peer"}
    # Findings of a node's own check are its own, whoever is silent.
    assert reasons(names, [["no GPU"], [], [SILENCE]]) == {"a": "no GPU", "c": SILENCE}
    # A missing node makes the other nodes' sums fail too.
    assert blame(names, [["broken pipe"], ["broken pipe"], [SILENCE]]) == {"c": SILENCE}


def test_a_job_goes_on_from_what_it_saved_and_from_nothing_set_aside(tmp_path: Path) -> None:
    """body.sh selects the newest complete checkpoint, and detects whether this job wrote it."""
    body = (ROOT / "slurm" / "body.sh").read_text()
    functions = re.findall(r"^(?:newest_checkpoint|saved_since)\(\) \{.*?^\}$", body, re.MULTILINE | re.DOTALL)
    assert len(functions) == 2
    checkpoints = tmp_path / "checkpoints"
    for age, name in ((30, "step_000010"), (20, "step_000020.abandoned-1"), (10, "step_000030.partial")):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "meta.json").write_text("{}")
        os.utime(checkpoints / name / "meta.json", (1e9 - age, 1e9 - age))

    def shell(started: float) -> list[str]:
        (tmp_path / "started").touch()
        os.utime(tmp_path / "started", (started, started))
        code = "\n".join(["set -euo pipefail", f"RUN_DIR={tmp_path}", *functions])
        code += "\nnewest_checkpoint\nif saved_since $RUN_DIR/started; then echo saved; else echo nothing; fi"
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert shell(started=1e9) == [str(checkpoints / "step_000010"), "nothing"]
    assert shell(started=1e9 - 60) == [str(checkpoints / "step_000010"), "saved"]
    (checkpoints / "step_000010" / "meta.json").write_text("")  # a full disk; the ranks pass over it too
    assert shell(started=1e9 - 60) == [str(checkpoints / "step_000010"), "nothing"]
    shutil.rmtree(checkpoints)
    assert shell(started=1e9) == ["nothing"]
