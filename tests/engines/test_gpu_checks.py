"""The checks of `gpu-check` at tiny sizes on a CPU, and the folder for a machine with torch and transformers only.

Measured here are the checks, not a machine: their numbers must lie within their bounds.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ranks import run

from megatron_aspo.config.import_path import import_object
from megatron_aspo.config.load import load_config
from megatron_aspo.tools.gpu_check import checks_layouts, checks_recipe, checks_runs
from megatron_aspo.tools.gpu_check import lab as tools
from megatron_aspo.tools.gpu_check.records import Check, Lab, Numbers, load_checks
from megatron_aspo.tools.planning.architectures import find_hf_config, shape_of_hf
from megatron_aspo.tools.rehearsal.run import rehearse_jobs

pytestmark = pytest.mark.engines

ROOT = Path(__file__).parents[2]
CHECKS = {check.name: check for check in load_checks()}
MACHINE = ("torch", "transformers", "triton", "numpy", "safetensors", "setuptools")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(str(tmp_path_factory.mktemp("lab")), "cpu")


def outside(check: Check, numbers: Numbers) -> list[str]:
    return [name for name, (low, high) in check.bounds.items() if not low <= numbers[name] <= high]


def numbers_of(check: Check, lab: Lab) -> Numbers:
    os.environ |= check.environment
    return import_object(check.target, "lab")(lab)


@pytest.mark.parametrize("name", ["6 truth", "7 first ratio", "11 resume", "12+13 memory of a checkpoint"])
def test_a_check_passes(name: str, lab: Lab) -> None:
    (numbers,) = run(1, numbers_of, CHECKS[name], lab)
    assert outside(CHECKS[name], numbers) == [], numbers


def test_lanes_carry_every_bit(lab: Lab) -> None:
    numbers, _ = run(2, checks_runs.lanes_rank, lab)
    assert outside(CHECKS["30 lanes"], numbers) == [], numbers


def step(lab: Lab, case: str) -> Numbers:
    os.environ["GPU_CHECK_CASE"] = case
    return checks_layouts.step(lab)


@pytest.mark.parametrize(("alone", "case"), [("one GPU, D", "CP 2"), ("one GPU, D", "overlapped")])
def test_a_layout_has_the_loss_of_one_rank(alone: str, case: str, lab: Lab) -> None:
    (expected,) = run(1, step, lab, alone)
    for numbers in run(2, step, lab, case):
        assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert abs(numbers["loss"]) > 1e-3


def measured_recipe(lab: Lab) -> tuple[dict[str, int], Numbers]:
    measured = checks_recipe.measure(lab, checks_recipe.make_job(lab, checks_recipe.cut(lab)))
    return measured.peaks, measured.seconds


def test_a_recipe_in_small(lab: Lab) -> None:
    """The rehearsed program on this machine; a CPU has no peaks, but live tensors."""
    peaks, seconds = run(1, measured_recipe, lab)[0]
    assert peaks["update"] > peaks["build"] > 0
    assert seconds["update"] > 0
    assert {"old log-probs", "refit", "checkpoint save"} < peaks.keys()


@pytest.mark.parametrize("recipe", ["qwen3_32b", "qwen3_30b_a3b", "qwen2_5_72b", "deepseek_v3_671b"])
def test_a_recipe_is_cut_to_the_shapes_of_one_rank(recipe: str) -> None:
    """The rank's part of a layer in the planner's count, and the cut layer's on one rank, are of one size."""
    config = load_config(str(ROOT / f"examples/{recipe}.yaml"))
    whole = find_hf_config(config.model.hf_path)
    cut = shape_of_hf(checks_recipe.cut_shape(whole, config.parallel), "cut")
    shape, tensor = shape_of_hf(whole, "whole"), config.parallel.tensor
    assert cut.num_layers == 2
    assert (cut.hidden_size, cut.head_dim) == (shape.hidden_size, shape.head_dim)
    assert cut.query_size == shape.query_size // tensor
    assert cut.kv_size == max(cut.head_dim, shape.kv_size // tensor)
    assert cut.vocab_size == shape.vocab_size // tensor
    assert cut.num_experts == shape.num_experts // config.parallel.expert
    assert cut.ffn_size == shape.ffn_size // tensor


# --- A machine with torch and transformers ---


def requirements(name: str, found: set[str]) -> set[str]:
    """Installed distributions that a package requires, with its own."""
    name = canonicalize_name(name)
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return found
    if name not in found:
        found.add(name)
        for line in map(Requirement, lines):
            if line.marker is None or line.marker.evaluate({"extra": ""}):
                requirements(line.name, found)
    return found


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages of such a machine, of this environment."""
    folder = tmp_path_factory.mktemp("machine")
    found: set[str] = set()
    for package in MACHINE:
        requirements(package, found)
    for name in found:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(distribution.locate_file(top)))
    return folder


def test_the_folder_for_a_bare_machine(machine: Path, tmp_path: Path) -> None:
    """Built, unpacked and run by a Python without this environment: refused without a GPU, and tried on the CPU."""
    subprocess.run([sys.executable, ROOT / "scripts/build_gpu_check.py", tmp_path / "build"], check=True)
    archive = tmp_path / "build/gpu-check.zip"
    assert archive.stat().st_size < 60 << 20
    python = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([python, "-m", "zipfile", "-e", archive, tmp_path], check=True)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(machine), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        command = [python, *(words if words[:1] == ("-c",) else ("gpu-check", *words))]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    refused = start()
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "no CUDA GPU" in refused.stderr
    newer = start("-c", "import runpy, sys; sys.version_info = (3, 13); runpy.run_path('gpu-check')")
    assert (newer.returncode, newer.stderr.count("\n")) == (2, 1)
    tried = start("--cpu")
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert "5 passed, 0 failed, 0 not run" in tried.stdout


# --- Megatron's local layers on a GPU ---


@pytest.mark.skipif(not (ROOT / ".cache/te/transformer_engine").is_dir(), reason="make rehearsal")
def test_local_layers_on_a_gpu_that_is_not_there(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor lies on the GPU, from the start to the update after a resume; attention is not Transformer
    Engine's."""
    monkeypatch.setenv("MEGATRON_ASPO_LAYERS", "local")
    config = tools.run_config(replace(lab, bare=True))
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    (trace,) = rehearse_jobs([checks_recipe.make_job(replace(lab, device="cuda"), config)])
    assert trace.phases["update after resume"].peak > 0
    assert any("policy/cpu/layers.py" in line for _, _, line in trace.syncs)
