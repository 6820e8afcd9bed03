"""`megatron-aspo doctor`: what this machine has, what is wrong with it, and what mends that.

A problem keeps runs from working (exit code 1), a warning may; what is merely absent is fine.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.cuda.nccl import version as nccl_version

GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """What was looked at and what was found; a `fix` where it is not ok."""

    what: str
    found: str
    status: Literal["ok", "warning", "problem"] = "ok"
    fix: str = ""


def examine() -> list[Finding]:
    """Look at everything, in the order in which things build upon each other."""
    parts = (_python(), _packages(), _transformer_engine(), _apex(), _torch(), _gpus(), _limits(), _slurm())
    return [finding for part in parts for finding in part]


def problems() -> list[str]:
    """Only what keeps runs from working, a line each."""
    return [f"{finding.what}: {finding.found}" for finding in examine() if finding.status == "problem"]


def main(as_json: bool) -> int:
    """Print all findings; 1 if there is a problem among them, else 0."""
    findings = examine()
    is_well = all(finding.status != "problem" for finding in findings)
    if as_json:
        print(json.dumps({"ok": is_well, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        table = Table(show_edge=False)
        for title in ("", "", "found", "fix"):
            table.add_column(title, overflow="fold")
        marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}
        for finding in findings:
            table.add_row(marks[finding.status], *map(escape, (finding.what, finding.found, finding.fix)))
        Console().print(table)
    return 0 if is_well else 1


def _python() -> Iterator[Finding]:
    found = platform.python_version()
    if found.startswith("3.12."):
        yield Finding("python", found)
    else:
        yield Finding("python", found, "problem", "make the environment with Python 3.12")


def _packages() -> Iterator[Finding]:
    """Installed versions against this package's own pins."""
    if installed("megatron-aspo") is None:
        found = "not installed, so its pins cannot be compared with what is"
        yield Finding("megatron-aspo", found, "warning", "pip install --no-deps -e . in its folder")
        return
    seen: set[str] = set()
    for line in requires("megatron-aspo") or []:
        pin = re.match(r"([\w.-]+)(?:\[.*\])?==([\w.]+)(?:.*extra == [\"'](\w+)[\"'])?", line)
        if pin is None or pin[3] == "dev" or pin[1] in seen:
            continue
        seen.add(pin[1])
        found = installed(pin[1])
        if found is not None and found.partition("+")[0] == pin[2]:
            yield Finding(pin[1], found)
        elif found is not None:
            yield Finding(pin[1], found, "warning", f"tested with {pin[2]} only: pip install {pin[1]}=={pin[2]}")
        elif pin[3] is None:
            yield Finding(pin[1], "not installed", "problem", f"pip install {pin[1]}=={pin[2]}")
        else:
            yield Finding(pin[1], f"not installed (only for [{pin[3]}])")
    found = installed("flash-attn")
    yield Finding("flash-attn", found or "not installed (Transformer Engine has attention of its own)")


def _transformer_engine() -> Iterator[Finding]:
    parts = {name: installed(name) for name in ("transformer-engine", "transformer-engine-torch")}
    parts["transformer-engine-cu*"] = installed("transformer-engine-cu13") or installed("transformer-engine-cu12")
    if not any(parts.values()):
        return
    found = ", ".join(f"{name} {number or 'missing'}" for name, number in parts.items())
    again = f"pip install transformer-engine[pytorch]=={parts['transformer-engine'] or '...'}"
    if len(set(parts.values())) > 1:
        yield Finding("transformer engine", found, "problem", f"its parts must be of one version: {again}")
    elif error := import_error("import torch, transformer_engine.pytorch"):
        fix = f"compile it against this torch: {again} --no-build-isolation --force-reinstall"
        yield Finding("transformer engine", f"{found}: {error}", "problem", fix)
    elif not torch.cuda.is_available():
        fix = "pip uninstall transformer-engine: with it there, Megatron takes its norms and optimizer on a CPU too"
        yield Finding("transformer engine", f"{found}, but no GPU", "problem", fix)
    else:
        yield Finding("transformer engine", found)


def _apex() -> Iterator[Finding]:
    found = installed("apex")
    if found is None:
        yield Finding("apex", "not installed (not needed)")
    elif "pyramid" in str(metadata("apex")).lower():
        fix = "pip uninstall apex: Megatron takes it for NVIDIA's and its norms break"
        yield Finding("apex", f"{found}, a web toolkit of that name", "problem", fix)
    else:
        for part in ("apex.optimizers, apex.multi_tensor_apply", "amp_C", "fused_weight_gradient_mlp_cuda"):
            if error := import_error(f"import torch, {part}"):
                fix = "compile apex with --cpp_ext --cuda_ext for this torch, or uninstall it"
                yield Finding("apex", f"{found}: {error}", "warning", fix)
                return
        yield Finding("apex", found)


def _torch() -> Iterator[Finding]:
    if not torch.distributed.is_gloo_available():
        yield Finding("gloo", "not in this torch", "problem", "install a torch that has it")
    if torch.version.cuda is None:
        yield Finding("CUDA", "this torch is for CPUs")
        return
    nccl = ".".join(map(str, nccl_version())) if torch.distributed.is_nccl_available() else "missing"
    works = "" if torch.cuda.is_available() else "; no GPU here that it can use"
    yield Finding("CUDA", f"torch for CUDA {torch.version.cuda}, NCCL {nccl}{works}")


_GPU_QUERY = ("index", "name", "compute_cap", "driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total")


def _gpus() -> Iterator[Finding]:
    promised = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    usable = torch.cuda.device_count()
    if usable < promised:
        fix = "leave this node out (sbatch --exclude), and tell who keeps it"
        yield Finding("GPUs", f"{usable} of the {promised} that Slurm gave answer", "problem", fix)
    if shutil.which("nvidia-smi") is None:
        if not usable:
            yield Finding("GPUs", "none; runs on the CPU")
        else:
            yield Finding("GPUs", f"{usable}; no nvidia-smi, so their health is unknown", "warning", "install it")
        return
    yield from read_gpus(_output("nvidia-smi", f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader,nounits"))
    yield from read_health(_output("nvidia-smi", "-q"), _output("dmesg"))


def read_gpus(table: str) -> Iterator[Finding]:
    """Findings from nvidia-smi's table of GPUs."""
    for line in table.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(_GPU_QUERY):
            yield Finding("nvidia-smi", line.strip(), "problem", "mend the driver, or leave this node out")
            continue
        index, name, capability, driver, used, errors = fields
        found = f"{name}, sm_{capability.replace('.', '')}, driver {driver}"
        if errors.isdecimal() and int(errors):
            found += f", {errors} uncorrected memory errors"
            yield Finding(f"GPU {index}", found, "problem", "reset the GPU or leave this node out")
        elif used.isdecimal() and int(used) > 1024:
            yield Finding(f"GPU {index}", f"{found}, {used} MiB taken", "warning", "end what else uses it")
        else:
            yield Finding(f"GPU {index}", found)


def read_health(report: str, kernel_log: str) -> Iterator[Finding]:
    """Findings from `nvidia-smi -q` and the kernel's log: what the driver wants done, rows of bad memory, Xids."""
    fix = "reset the GPUs or reboot; leave this node out until then"
    for action in set(re.findall(r"GPU Recovery Action\s*:\s*(.+)", report)) - {"None", "N/A"}:
        yield Finding("GPU health", f"the driver asks for: {action}", "problem", fix)
    if re.search(r"Remapping Failure Occurred\s*:\s*Yes", report):
        yield Finding("GPU health", "bad memory rows that could not be replaced", "problem", "have the GPU exchanged")
    if re.search(r"^\s+Pending\s*:\s*Yes", report, re.MULTILINE):
        yield Finding("GPU health", "bad memory rows wait for a reset to be replaced", "problem", fix)
    xids = re.findall(r"NVRM: Xid \([^)]*\): (\d+)", kernel_log)
    if xids:
        found = f"{len(xids)} Xid errors since boot, the last is {xids[-1]}"
        yield Finding("GPU health", found, "warning", "look it up in NVIDIA's list of Xid errors")


def _limits() -> Iterator[Finding]:
    shared = shutil.disk_usage("/dev/shm")
    found = f"{shared.free / GIB:.1f} of {shared.total / GIB:.1f} GiB free"
    if shared.free < GIB:
        fix = "delete what dead processes left there, or give the container more (--shm-size=16g)"
        yield Finding("/dev/shm", found, "problem" if shared.free < GIB / 16 else "warning", fix)
    else:
        yield Finding("/dev/shm", found)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 4096:
        yield Finding("open files", f"at most {files}", "warning", "ulimit -n 65536")
    else:
        yield Finding("open files", f"at most {files}")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.path.isdir("/sys/class/infiniband") and locked != resource.RLIM_INFINITY:
        fix = "ulimit -l unlimited (in Slurm: PropagateResourceLimitsExcept=MEMLOCK)"
        yield Finding("locked memory", f"at most {locked / GIB:.3g} GiB, and InfiniBand needs it", "warning", fix)


def _slurm() -> Iterator[Finding]:
    if "SLURM_JOB_ID" in os.environ:
        job, nodes = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_JOB_NODELIST", "?")
        yield Finding("slurm", f"job {job} on {nodes}")
    elif shutil.which("sbatch"):
        yield Finding("slurm", _output("sbatch", "--version").strip() or "sbatch is there but does not run")
    else:
        yield Finding("slurm", "not here (only slurm/ needs it)")


def installed(name: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def import_error(code: str) -> str | None:
    """The last line of what goes wrong when a new python runs `code`: some imports crash, or change this process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]


def _output(*command: str) -> str:
    """What a command prints, on whichever stream; "" where there is no such command."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False)
    return done.stdout.decode(errors="replace")
