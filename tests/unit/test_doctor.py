"""The doctor: it finds nothing wrong where the tests run, and what is wrong elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_aspo import cli, doctor

# Fields in the order of nvidia-smi's answer to the doctor's question.
HEALTHY = "0, NVIDIA H100 80GB HBM3, 9.0, 570.86.15, 4, 0"
BAD_MEMORY = "1, NVIDIA H100 80GB HBM3, 9.0, 570.86.15, 4, 12"
TAKEN = "2, NVIDIA H100 80GB HBM3, 9.0, 570.86.15, 40960, 0"
LOST = "Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error"


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_other_versions_and_the_other_apex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "megatron-core", "0.18.0")
    install(tmp_path, "apex", "0.9.10.dev0", "toolkit for Pyramid")
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


def test_an_import_that_fails_is_told_in_one_line() -> None:
    assert doctor.import_error("import json") is None
    assert doctor.import_error("import no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"
    assert doctor.import_error("import os; os.abort()") == "ended with -6"
