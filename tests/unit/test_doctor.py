"""The doctor: it finds nothing wrong where the tests run, and what is wrong elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_aspo import cli, doctor

# Fields in the order of nvidia-smi's answer to the doctor's question.
HEALTHY = "0, NVIDIA H100 80GB HBM3, 9.0, 570.86.15, 4, 0"
BAD_MEMORY = "1, NVIDIA H100 80GB HBM3, 9.0, 570.86.15, 4, 12"
TAKEN = "2, NVIDIA H100 80GB HBM3, 9.0, 570.86.15, 40960, 0"
LOST = "Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error"


@pytest.mark.slow  # as whatever looks at everything: it imports torch, Megatron and vLLM
def test_this_machine_is_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    found = {finding["what"]: finding for finding in told["findings"]}
    assert found["torch"]["status"] == found["megatron-core"]["status"] == "ok"
    assert {"python", "apex", "flash-attn", "CUDA", "GPUs", "/dev/shm", "open files", "slurm"} <= found.keys()
    assert cli.main(["doctor"]) == 0
    assert "not installed (only for [gpu])" in capsys.readouterr().out


def install(root: Path, name: str, version: str, summary: str = "") -> None:
    folder = root / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n")


@pytest.mark.slow
def test_other_versions_and_the_other_apex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "megatron-core", "0.18.0")
    install(tmp_path, "apex", "0.9.10.dev0", "toolkit for Pyramid")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    install(tmp_path, "transformer-engine", "2.20.2")
    install(tmp_path, "transformer-engine-torch", "2.19.0")
    monkeypatch.syspath_prepend(tmp_path)
    found = {finding.what: finding for finding in doctor.examine()}
    assert found["megatron-core"].status == "warning"
    assert "pip install megatron-core==0.19.2" in found["megatron-core"].fix
    assert found["apex"].status == "problem"
    assert "pip uninstall apex" in found["apex"].fix
    assert found["transformer engine"].status == "problem"
    assert "transformer-engine-torch 2.19.0" in found["transformer engine"].found
    assert len(doctor.problems()) == 2
    assert cli.main(["doctor"]) == 1
    assert "problem" in capsys.readouterr().out


@pytest.mark.slow
def test_gpus_that_slurm_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1000")
    assert any(problem.endswith("of the 1000 that Slurm gave answer") for problem in doctor.problems())


def test_what_nvidia_smi_tells() -> None:
    found = list(doctor.read_gpus("\n".join((HEALTHY, BAD_MEMORY, TAKEN, LOST))))
    assert [finding.status for finding in found] == ["ok", "problem", "warning", "problem"]
    assert found[0].found == "NVIDIA H100 80GB HBM3, sm_90, driver 570.86.15"
    assert "12 uncorrected memory errors" in found[1].found


@pytest.mark.parametrize(
    ("report", "log", "expected"),
    [
        ("    GPU Recovery Action               : None\n    Remapped Rows\n        Pending   : No\n", "", []),
        ("    GPU Recovery Action               : Reset\n", "", ["problem"]),
        ("    Remapped Rows\n        Pending                       : Yes\n", "", ["problem"]),
        ("        Remapping Failure Occurred        : Yes\n", "", ["problem"]),
        ("", "[12.3] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n", ["warning"]),
    ],
)
def test_what_the_driver_and_the_kernel_tell(report: str, log: str, expected: list[str]) -> None:
    assert [finding.status for finding in doctor.read_health(report, log)] == expected


def test_imports_that_fail_are_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aborting.py").write_text("import os; print('half a line', end=''); os.abort()")
    (tmp_path / "raising.py").write_text("raise RuntimeError('built for\\nanother torch')")
    (tmp_path / "hanging.py").write_text("import time; time.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 5)
    assert doctor.import_errors("json", "raising", "aborting", "no_such_module", "hanging", "csv") == {
        "raising": "RuntimeError: built for another torch",
        "aborting": "ended with -6",
        "no_such_module": "ModuleNotFoundError: No module named 'no_such_module'",
        "hanging": "not done after 5 s",
    }


def doctor_beside(folder: Path, limits: str = "true") -> dict[str, dict[str, str]]:
    """What the doctor finds, by name, in a new python that finds the packages of `folder` before all others."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = f"{limits} && exec {sys.executable} -m megatron_aspo.cli doctor --json"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"]) == (1, False), done.stderr
    return {finding["what"]: finding for finding in told["findings"]}


@pytest.mark.slow
def test_broken_packages_low_limits_and_the_other_apex(tmp_path: Path) -> None:
    install(tmp_path, "apex", "0.9.10.dev0", "toolkit for Pyramid")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    install(tmp_path, "flash-attn", "2.8.3")
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    found = doctor_beside(tmp_path, "ulimit -n 64")
    assert found["apex"]["status"] == "problem"
    assert "apex 0.9.10.dev0 (toolkit for Pyramid)" in found["apex"]["found"]
    assert found["apex"]["fix"].startswith("pip uninstall apex")
    assert found["flash-attn"]["status"] == "warning"
    assert found["flash-attn"]["found"] == "2.8.3 cannot be imported: ImportError: undefined symbol: _ZN3c10"
    assert found["open files"] == {
        "what": "open files", "found": "at most 64", "status": "warning", "fix": "ulimit -n 65536"
    }  # fmt: skip
    assert found["megatron-core"]["status"] == found["torch"]["status"] == "ok"


@pytest.mark.slow
def test_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    found = doctor_beside(tmp_path)
    assert found["torch"]["status"] == "problem"
    assert "OSError: libcudart.so.13: cannot open shared object file" in found["torch"]["found"]
    assert found["torch"]["fix"] == "pip install --force-reinstall --no-deps torch==2.13.0"
    assert found["CUDA"]["found"] == "unknown without torch"
    assert found["python"]["status"] == "ok"


def test_slurm_variables_that_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": "7", "PROCID": "1", "LOCALID": "1", "NTASKS": "32"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    told = [finding.found for finding in doctor._slurm() if finding.status == "warning"]
    assert "32 tasks, but WORLD_SIZE=1" in told


def test_a_cache_for_models_that_is_too_small_or_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/proc/models")
    (finding,) = doctor._folders()
    assert finding.status == "warning"
    assert finding.found in ("/proc/models, 0 GiB free", "/proc/models cannot be written")  # root may, elsewhere
    assert finding.fix.startswith("set HF_HOME to ")
