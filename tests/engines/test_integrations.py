"""examples/integrations: each folder's own test, in the environment of its framework.

Megatron-LM's adapter is tested in tests/distributed.
"""

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


def command_of(page: Path) -> str:
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    (command,) = (block for block in blocks if "-m pytest" in block)
    return command


@pytest.mark.parametrize("folder", ["verl", "trl", "slime", "nemo_rl"])
def test_the_adapters(folder: str) -> None:
    """Run the page's own command; its `python` is the first one in PATH. slime and NeMo-RL are stand-ins in .venv."""
    if folder in ("verl", "trl") and not PYTHON.exists():
        pytest.skip("no verl, no TRL: make integrations")
    python = PYTHON if folder in ("verl", "trl") else Path(sys.executable)
    path = f"{python.parent}:{os.environ['PATH']}"
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
    assert re.search(r"^=+ \d+ passed(, \d+ warnings?)? in ", done.stdout, re.MULTILINE)  # none was skipped
