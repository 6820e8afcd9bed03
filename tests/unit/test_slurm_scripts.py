"""slurm/ without Slurm: what a dry run prints."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_aspo.config_file import load_config
from megatron_aspo.node_check import SILENCE, blame, rank_environment

ROOT = Path(__file__).parents[2]
SCRIPTS = {"aspo_32b": 4, "aspo_72b": 8, "aspo_235b_a22b": 16, "aspo_671b": 32}


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
    name = script.replace("_", "-")
    assert train[-4:] == [f"name={name}", "output_dir=runs", "checkpoint.resume=auto", "loss.clip_high=0.28"]
    assert f"--output={ROOT}/runs/{name}/logs/0-0/node%n-rank%t.log" in train
    assert not any("container" in word for word in train)
    assert "secret" not in done.stdout + done.stderr


def test_a_container() -> None:
    words = ("CONTAINER=/images/aspo.sqsh", "CONTAINER_MOUNTS=/data:/data", "name=mine", "output_dir=/scratch")
    done = dry_run("aspo_32b", *words, HF_HOME="/hf")
    for command in (shlex.split(line) for line in done.stdout.splitlines()):
        (mounts,) = (word.partition("=")[2] for word in command if word.startswith("--container-mounts="))
        assert mounts == f"{ROOT}:{ROOT},/scratch/mine:/scratch/mine,/hf:/hf,/data:/data"
        assert "--container-image=/images/aspo.sqsh" in command
        assert f"--container-workdir={ROOT}" in command
        assert "--no-container-mount-home" in command
        assert "python" in command  # the container's


def test_torchrun() -> None:
    done = dry_run("aspo_32b", "LAUNCHER=torchrun", "RECIPE=tiny")
    train = shlex.split(done.stdout.splitlines()[1])
    assert {"--ntasks=4", "--ntasks-per-node=1", "torch.distributed.run", "examples/tiny.yaml"} <= set(train)
    assert train[train.index("--nproc-per-node") + 1] == "8"


def test_mistakes() -> None:
    wrong = dry_run("aspo_32b", "LAUNCHER=mpirun")
    assert (wrong.returncode, "LAUNCHER=mpirun is neither srun nor torchrun" in wrong.stdout) == (2, True)
    outside = dry_run("aspo_32b", DRY_RUN="0")
    assert (outside.returncode, "not inside a Slurm job" in outside.stdout) == (2, True)


def test_the_ranks_environment_goes_by_layout_and_gpu() -> None:
    config = load_config(ROOT / "examples/tiny.yaml")
    assert rank_environment(config, (9, 0))["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in rank_environment(config, (10, 0))
    assert rank_environment(config, (10, 0))["NVTE_FWD_LAYERNORM_SM_MARGIN"] == "16"
    assert rank_environment(config, None) == {}
    alone = load_config(ROOT / "examples/tiny.yaml", ["parallel.tensor=1"])
    assert rank_environment(alone, (9, 0)) == {}


def test_whom_to_blame() -> None:
    names = ["a", "b", "c"]
    assert blame(names, [[], [], []]) == {}
    assert blame(names, [[], ["no GPU", "no room"], []]) == {"b": "no GPU; no room"}
    # A node that is gone makes the others' sums fail too.
    assert blame(names, [["broken pipe"], ["broken pipe"], [SILENCE]]) == {"c": SILENCE}
