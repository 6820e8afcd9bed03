"""examples/integrations: each folder's own test, in the environment where its framework is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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
    run_tests(PYTHON, ["verl", "trl"], 28 + 21)


def test_the_adapters_by_the_published_interfaces() -> None:
    run_tests(sys.executable, ["slime", "nemo_rl"], 18 + 14)


def test_the_plain_loop_needs_torch_alone() -> None:
    """The first code of the TRL page, where importing anything that `make install` adds to torch is an error."""
    (code, *_) = re.findall(r"^```python\n(.*?)^```", (FOLDERS / "trl/README.md").read_text(), re.MULTILINE | re.DOTALL)
    script = f"""
import sys
import torch
there = {{name.partition(".")[0] for name in sys.modules}} | sys.stdlib_module_names | {{"megatron_aspo"}}

class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in there:
            raise AssertionError(f"the plain loop imports {{name}}")

sys.meta_path.insert(0, Only())
torch.manual_seed(0)
{code}
assert out.metrics["approx_kl"][0] > 0
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_adapters_are_short() -> None:
    adapters = {path: len(path.read_text().splitlines()) for path in FOLDERS.glob("*/*_aspo.py")}
    assert {path.parent.name for path in adapters} == {path.parent.name for path in FOLDERS.glob("*/README.md")}
    assert max(adapters.values()) <= 100
