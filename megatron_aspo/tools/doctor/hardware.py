"""GPUs and limits of the operating system on this machine."""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
from collections.abc import Iterator

from megatron_aspo.config.fp8 import device_recipes
from megatron_aspo.tools.doctor.probes import Finding, TorchFacts, ask

GIB = 1 << 30

_GPU_QUERY = ("index", "name", "compute_cap", "driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total")


def check_torch(facts: TorchFacts) -> Iterator[Finding]:
    """Whether torch reaches the GPUs that it was built for."""
    if facts.error:
        fix = "mend torch, reset the GPUs or reboot, or leave this node out"
        yield Finding("CUDA", f"torch finds no GPUs: {facts.error}", "problem", fix)
    elif facts.cuda is None:
        yield Finding("CUDA", "this torch is for CPUs")
    else:
        usable = "" if facts.capabilities else "; no usable GPU here"
        yield Finding("CUDA", f"torch for CUDA {facts.cuda}, NCCL {facts.nccl or 'missing'}{usable}")


def check_fp8(facts: TorchFacts) -> Iterator[Finding]:
    """FP8 recipes that the GPUs compute."""
    if facts.cuda is None or not facts.capabilities:
        yield Finding("FP8", "no GPU")
        return
    major, minor = map(int, facts.cuda.split(".")[:2])
    for capability in sorted(set(facts.capabilities)):
        recipes = ", ".join(device_recipes(capability, (major, minor))) or "none"
        yield Finding("FP8", f"sm_{capability[0]}{capability[1]} with CUDA {facts.cuda} computes: {recipes}")


def check_gpus(facts: TorchFacts) -> Iterator[Finding]:
    """Number and health of the GPUs."""
    promised, usable = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0), len(facts.capabilities)
    if usable < promised:
        fix = "leave this node out (sbatch --exclude), and report it to its administrator"
        yield Finding("GPUs", f"{usable} of the {promised} GPUs that Slurm granted answer", "problem", fix)
    if shutil.which("nvidia-smi") is None:
        if usable:
            yield Finding("GPUs", f"{usable}; no nvidia-smi, so their health is unknown", "warning", "install it")
        else:
            yield Finding("GPUs", "none; runs use the CPU")
        return
    table, error = ask("nvidia-smi", f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader,nounits")
    if error:
        yield Finding("GPUs", f"nvidia-smi: {error}", "problem", "repair the driver, reboot, or leave this node out")
        return
    yield from read_gpus(table)
    kernel_log = ask("dmesg")[0] if shutil.which("dmesg") else ""
    yield from read_health(ask("nvidia-smi", "-q")[0], kernel_log)


def read_gpus(table: str) -> Iterator[Finding]:
    """Findings from nvidia-smi's table of GPUs."""
    for line in table.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(_GPU_QUERY):
            yield Finding("nvidia-smi", line.strip(), "problem", "repair the driver, or leave this node out")
            continue
        index, name, capability, driver, used, errors = fields
        found = f"{name}, sm_{capability.replace('.', '')}, driver {driver}"
        if errors.isdecimal() and int(errors):
            found += f", {errors} uncorrected memory errors"
            yield Finding(f"GPU {index}", found, "problem", "reset the GPU or leave this node out")
        elif used.isdecimal() and int(used) > 1024:
            yield Finding(f"GPU {index}", f"{found}, {used} MiB in use", "warning", "end other processes on it")
        else:
            yield Finding(f"GPU {index}", found)


def read_health(report: str, kernel_log: str) -> Iterator[Finding]:
    """Findings from `nvidia-smi -q` and the kernel's log: requested resets, bad memory rows, Xid errors."""
    fix = "reset the GPUs or reboot; leave this node out until then"
    for action in set(re.findall(r"GPU Recovery Action\s*:\s*(.+)", report)) - {"None", "N/A"}:
        yield Finding("GPU health", f"the driver requests: {action}", "problem", fix)
    if re.search(r"Remapping Failure Occurred\s*:\s*Yes", report):
        yield Finding("GPU health", "bad memory rows that could not be replaced", "problem", "have the GPU exchanged")
    if re.search(r"^\s+Pending\s*:\s*Yes", report, re.MULTILINE):
        yield Finding("GPU health", "bad memory rows wait for a reset to be replaced", "problem", fix)
    if xids := re.findall(r"NVRM: Xid \([^)]*\): (\d+)", kernel_log):
        found = f"{len(xids)} Xid errors since boot, the last is {xids[-1]}"
        yield Finding("GPU health", found, "warning", "look it up in NVIDIA's list of Xid errors")


def check_limits() -> Iterator[Finding]:
    """Shared memory and the limits of a process."""
    shared = shutil.disk_usage("/dev/shm")
    found = f"{shared.free / GIB:.1f} of {shared.total / GIB:.1f} GiB free"
    fix = "delete what dead processes left there, or give the container more (--shm-size=16g)"
    status = "problem" if shared.free < GIB / 16 else "warning" if shared.free < GIB else "ok"
    yield Finding("/dev/shm", found, status, "" if status == "ok" else fix)
    limits: list[tuple[str, int, float, str]] = [
        ("open files", resource.RLIMIT_NOFILE, 4096, "ulimit -n 65536"),
        ("threads", resource.RLIMIT_NPROC, 4096, "ulimit -u 65536: each rank has some hundred threads"),
    ]
    if os.path.isdir("/sys/class/infiniband"):
        fix = "ulimit -l unlimited for InfiniBand (in Slurm: PropagateResourceLimitsExcept=MEMLOCK)"
        limits.append(("locked memory", resource.RLIMIT_MEMLOCK, math.inf, fix))
    for name, limit, least, fix in limits:
        value = resource.getrlimit(limit)[0]
        if value == resource.RLIM_INFINITY or value >= least:
            yield Finding(name, "enough")
        else:
            yield Finding(name, f"at most {value}", "warning", fix)
