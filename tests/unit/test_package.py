"""The package as it is built and installed: its files, version and command line, types, and what importing it costs."""

from __future__ import annotations

import csv
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
    # The package of this checkout must not come to the installed one's help.
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


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with the wheel; for the rest it looks into this one, which is the locked one."""
    folder = tmp_path_factory.mktemp("installed")
    uv = ROOT / "scripts" / "bootstrap.sh", "uv"
    output(*uv, "venv", "--python", sys.executable, folder / "venv", cwd=ROOT)
    python = folder / "venv" / "bin" / "python"
    output(*uv, "pip", "install", "--no-config", "--no-deps", "--offline", "--python", python, wheel, cwd=ROOT)
    purelib = Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (purelib / "locked.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        recorded = csv.reader(archive.read(f"{NAME}.dist-info/RECORD").decode().splitlines())
        assert sorted(row[0] for row in recorded) == sorted(names)
    tracked = output("git", "ls-files", "--cached", "--others", "--exclude-standard", "megatron_aspo", cwd=ROOT)
    assert sorted(n for n in names if ".dist-info/" not in n) == sorted(tracked.splitlines())
    assert {"megatron_aspo/py.typed", "megatron_aspo/report/samples.js"} <= set(names)


def test_the_sdist_builds_the_same_wheel(built: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
        names = archive.getnames()
    assert f"{NAME}/examples/demo_chain_sum.yaml" in names
    assert {name.split("/")[1] for name in names} == {
        *("megatron_aspo", "examples", "CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"),
        *("PKG-INFO", ".gitignore"),  # hatchling's own
    }
    output(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=tmp_path / NAME)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_version_stands_in_one_place(wheel: Path) -> None:
    assert re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}(-[0-9A-Za-z.-]+)?", VERSION)  # semver.org
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    with zipfile.ZipFile(wheel) as archive:
        assert f"\nVersion: {VERSION}\n" in archive.read(f"{NAME}.dist-info/METADATA").decode()
    assert re.search(rf"^## {re.escape(VERSION)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_command_line_of_an_installed_wheel(installed: Path) -> None:
    python, command = installed / "venv" / "bin" / "python", installed / "venv" / "bin" / "megatron-aspo"
    where = Path(output(python, "-c", "import megatron_aspo; print(megatron_aspo.__file__)", cwd=installed).strip())
    assert where.is_relative_to(installed)
    assert output(command, "--version", cwd=installed) == f"megatron-aspo {VERSION}\n"
    plan = json.loads(output(command, "plan", ROOT / "examples" / "qwen2_5_32b.yaml", "--json", cwd=installed))
    assert plan["fits"] is True
    refused = subprocess.run([command, "train", "no.yaml"], cwd=installed, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("megatron-aspo: no configuration file at no.yaml")


def test_a_type_checker_takes_its_types(installed: Path) -> None:
    """Every name of the loss has a type, and a wrong argument is found, in code that sees only the installed wheel."""
    pyright = Path(sys.executable).parent / "pyright"
    # It asks the first python in PATH where packages lie.
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
    done = subprocess.run(
        [pyright, "--outputjson", "consumer.py"],
        cwd=installed,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    (error,) = json.loads(done.stdout)["generalDiagnostics"]
    assert error["rule"] == "reportArgumentType"
    assert error["range"]["start"]["line"] == 2


def import_seconds(installed: Path, before: str, module: str) -> float:
    """CPU time of importing `module` where `before` is imported already: the least of five processes, of which the
    first writes the bytecode. A busy machine takes longer by the clock, hardly in CPU time."""
    code = f"import {before}, time\nstart = time.process_time()\nimport {module}\nprint(time.process_time() - start)"
    python = installed / "venv" / "bin" / "python"
    return min(float(output(python, "-c", code, cwd=installed, OMP_NUM_THREADS="1")) for _ in range(5))


def test_importing_the_package_is_nothing(installed: Path) -> None:
    assert import_seconds(installed, "sys", "megatron_aspo") < 0.02  # of 0.3 allowed
    assert import_seconds(installed, "sys", "megatron_aspo.cli") < 0.3


@pytest.mark.slow
def test_importing_the_loss_is_importing_torch(installed: Path) -> None:
    assert import_seconds(installed, "torch", "megatron_aspo.loss") < TORCH_ALONE
