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

pytestmark = [pytest.mark.engines, pytest.mark.slow]


def run_tests(python: str | Path, folders: list[str], tests: int) -> None:
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(FOLDERS / folder for folder in folders)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    closing = re.findall(r"^.*\d passed.*$", done.stdout, re.MULTILINE)
    assert len(closing) == 1
    assert re.match(rf"{tests} passed( in|, \d+ warnings? in) ", closing[0])  # none was skipped


@pytest.mark.skipif(not PYTHON.exists(), reason="no verl, no TRL: make integrations")
def test_the_adapters_in_their_frameworks() -> None:
    run_tests(PYTHON, ["verl", "trl"], 28 + 22)


def test_the_adapters_by_the_published_interfaces() -> None:
    run_tests(sys.executable, ["slime", "nemo_rl"], 19 + 14)


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
