"""examples/integrations: each folder's own test, in the environment where its framework is."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ROOT / "examples/integrations"
PYTHON = ROOT / ".venv-integrations/bin/python"
WITH_TESTS = ("verl", "trl", "slime", "nemo_rl")
"""Megatron-LM's adapter is tested in tests/distributed."""

pytestmark = [pytest.mark.engines, pytest.mark.slow]


def command_of(page: Path) -> str:
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    (command,) = (block for block in blocks if "-m pytest" in block)
    return command


def run_tests(python: str | Path, folder: str, tests: int) -> None:
    """By the page's own command; its `python` is the one that comes first on the path."""
    path = f"{Path(python).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", command_of(FOLDERS / folder / "README.md")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTEST_ADDOPTS": "-p no:cacheprovider"},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    closing = re.findall(r"^.*\d passed.*$", done.stdout, re.MULTILINE)
    assert len(closing) == 1
    assert re.match(rf"=+ {tests} passed(, \d+ warnings?)? in ", closing[0])  # none was skipped


@pytest.mark.skipif(not PYTHON.exists(), reason="no verl, no TRL: make integrations")
@pytest.mark.parametrize(("folder", "tests"), [("verl", 32), ("trl", 28)])
def test_the_adapters_in_their_frameworks(folder: str, tests: int) -> None:
    run_tests(PYTHON, folder, tests)


@pytest.mark.parametrize(("folder", "tests"), [("slime", 25), ("nemo_rl", 18)])
def test_the_adapters_by_the_published_interfaces(folder: str, tests: int) -> None:
    run_tests(sys.executable, folder, tests)


def test_the_overview_has_a_pages_command() -> None:
    assert command_of(FOLDERS / "README.md") in {command_of(FOLDERS / name / "README.md") for name in WITH_TESTS}


def what_torch_requires() -> set[str]:
    """Names of the modules of torch and of all that it requires."""

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", name)[0]).lower()

    seen: set[str] = set()
    todo = {"torch"}
    while todo:
        seen.add(name := todo.pop())
        with contextlib.suppress(PackageNotFoundError):  # of another platform
            todo |= {canonical(need) for need in requires(name) or () if "extra ==" not in need} - seen
    return {module for module, names in packages_distributions().items() if seen & set(map(canonical, names))}


def test_the_plain_loop_needs_torch_alone(tmp_path: Path) -> None:
    """The first code of the TRL page, where no other package can be imported than torch and what it requires."""
    (code, *_) = re.findall(r"^```python\n(.*?)^```", (FOLDERS / "trl/README.md").read_text(), re.MULTILINE | re.DOTALL)
    for module in what_torch_requires():
        for place in Path(sysconfig.get_path("purelib")).glob(f"{module.partition('/')[0]}*"):
            if place.name in (module, f"{module}.py"):
                (tmp_path / place.name).symlink_to(place)
    assert {"torch", "sympy", "typing_extensions.py"} <= {place.name for place in tmp_path.iterdir()}
    check = """
assert out.metrics["approx_kl"][0] > 0
assert not {"megatron", "transformers", "numpy", "yaml"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys, torch\ntorch.manual_seed(0)\n{code}{check}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_adapters_are_short() -> None:
    adapters = {path: len(path.read_text().splitlines()) for path in FOLDERS.glob("*/*_aspo.py")}
    assert {path.parent.name for path in adapters} == {path.parent.name for path in FOLDERS.glob("*/README.md")}
    assert max(adapters.values()) <= 100


def test_python_3_10_takes_what_the_adapters_import() -> None:
    """Frameworks' environments are often older than this project's: syntax by ruff, the standard library by pyright."""
    listing = """
import sys, megatron_aspo.loss
print(*(module.__file__ for name, module in sys.modules.items() if name.startswith("megatron_aspo")), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", listing], cwd=ROOT, capture_output=True, text=True, check=True)
    library = {*map(Path, done.stdout.split()), *(ROOT / "megatron_aspo/loss").rglob("*.py")}  # some come later
    assert ROOT / "megatron_aspo/config.py" in library
    python = [sys.executable, "-m"]
    syntax = [*python, "ruff", "check", "--isolated", "--no-cache", "--target-version", "py310", "--ignore", "ALL"]
    checked = [*syntax, *library, *FOLDERS.glob("*/*.py")]
    for command in (checked, [*python, "pyright", "--pythonversion", "3.10", *library]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
