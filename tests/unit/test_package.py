"""The built and installed package: its files, version, command line and types, and the cost of importing it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import megatron_aspo

ROOT = Path(__file__).parents[2]
VERSION = megatron_aspo.__version__
NAME = f"megatron_aspo-{VERSION}"
TORCH_ALONE = 0.05
"""CPU seconds that importing the loss may take beyond torch's."""


def output(*command: str | Path, cwd: Path, **environment: str) -> str:
    # Hides this checkout's package from the installed one.
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")}
    done = subprocess.run([*command], cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist."""
    folder = tmp_path_factory.mktemp("dist")
    output(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return built / f"{NAME}-py3-none-any.whl"


def install(wheel: Path, folder: Path) -> Path:
    """Return the folder of a new environment `venv` that has only the wheel."""
    uv = ROOT / "scripts" / "bootstrap.sh", "uv"
    output(*uv, "venv", "--python", sys.executable, folder / "venv", cwd=ROOT)
    python = folder / "venv" / "bin" / "python"
    output(*uv, "pip", "install", "--no-config", "--no-deps", "--offline", "--python", python, wheel, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; all other packages come from the current, locked environment."""
    folder = install(wheel, tmp_path_factory.mktemp("installed"))
    (purelib,) = folder.glob("venv/lib/python*/site-packages")
    (purelib / "locked.pth").write_text(sysconfig.get_path("purelib"))
    where = output(folder / "venv/bin/python", "-c", "import megatron_aspo; print(megatron_aspo.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(folder)
    return folder


def test_the_base_install_is_the_loss(wheel: Path, tmp_path: Path) -> None:
    install(wheel, tmp_path)
    (about,) = importlib.metadata.distributions(path=[str(wheel)])
    assert [line for line in about.requires or () if "extra ==" not in line] == ["torch>=2.6"]
    assert about.metadata["Requires-Python"] == ">=3.10"
    extras = ["cpu", "dev", "docs", "gpu", "hf", "mlflow", "smollm2", "train", "wandb"]
    assert sorted(about.metadata.get_all("Provides-Extra") or []) == extras
    output(tmp_path / "venv" / "bin" / "python", "-c", "import megatron_aspo.config.loss", cwd=tmp_path)
    command = tmp_path / "venv" / "bin" / "megatron-aspo"
    refused = subprocess.run([command, "train", "a.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"megatron-aspo: [^\n]*pip install 'megatron-aspo\[train\]'[^\n]*\n", refused.stderr)


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    tracked = output("git", "ls-files", "--cached", "--others", "--exclude-standard", "megatron_aspo", cwd=ROOT)
    assert sorted(names) == sorted(name for name in tracked.splitlines() if (ROOT / name).exists())
    assert {"megatron_aspo/py.typed", "megatron_aspo/tools/report/samples.js"} <= set(names)


def test_the_sdist_builds_the_same_wheel(built: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
        names = archive.getnames()
    assert f"{NAME}/examples/demo_chain_sum.yaml" in names
    assert {name.split("/")[1] for name in names} == {
        *("megatron_aspo", "examples", "CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"),
        *("PKG-INFO", ".gitignore"),  # added by hatchling
    }
    output(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=tmp_path / NAME)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_version_stands_in_one_place(wheel: Path) -> None:
    assert re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}(-[0-9A-Za-z.-]+)?", VERSION)  # semver.org
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (about,) = importlib.metadata.distributions(path=[str(wheel)])
    assert about.version == VERSION
    assert f"\n## {VERSION} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_type_checker_takes_its_types(installed: Path) -> None:
    """Every name of the loss has a type, and a wrong argument is reported, in code that sees only the installed
    wheel."""
    pyright = Path(sys.executable).parent / "pyright"
    # pyright runs the first python in PATH to locate packages.
    path = os.pathsep.join([str(installed / "venv" / "bin"), os.environ["PATH"]])
    found = output(pyright, "--verifytypes", "megatron_aspo.loss", "--ignoreexternal", cwd=installed, PATH=path)
    assert "No py.typed file found" not in found
    assert "Type completeness score: 100%" in found
    count = re.search(r'Symbols exported by "megatron_aspo.loss": (\d+)', found)
    assert count is not None
    assert int(count[1]) > 100
    (installed / "consumer.py").write_text(
        "from megatron_aspo.loss import PolicyLossConfig\n"
        "PolicyLossConfig(clip_low=0.1)\n"
        "PolicyLossConfig(clip_low='a')\n"
    )
    command, environment = [pyright, "--outputjson", "consumer.py"], {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True)
    (error,) = json.loads(done.stdout)["generalDiagnostics"]
    assert error["rule"] == "reportArgumentType"
    assert error["range"]["start"]["line"] == 2


def import_seconds(installed: Path, before: str, module: str) -> float:
    """CPU time of importing `module` after `before`: the minimum of five processes, the first of which writes the
    bytecode. Other load affects CPU time less than wall-clock time."""
    code = f"import {before}, time\nstart = time.process_time()\nimport {module}\nprint(time.process_time() - start)"
    python = installed / "venv" / "bin" / "python"
    return min(float(output(python, "-c", code, cwd=installed, OMP_NUM_THREADS="1")) for _ in range(5))


def test_importing_the_package_is_nothing(installed: Path) -> None:
    """Measured by the import of asyncio, 0.04 s on a fast CPU and 0.09 s on a slow one. 0.3 s are allowed."""
    measure = import_seconds(installed, "sys", "asyncio")
    assert import_seconds(installed, "sys", "megatron_aspo") < 0.3 * measure
    assert import_seconds(installed, "sys", "megatron_aspo.cli") < 6 * measure


@pytest.mark.slow
def test_importing_the_loss_is_importing_torch(installed: Path) -> None:
    assert import_seconds(installed, "torch", "megatron_aspo.loss") < TORCH_ALONE
