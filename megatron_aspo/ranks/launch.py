"""Starts, joins and ends the ranks of this host."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_aspo.config.model import ParallelConfig

GRACE_SECONDS = 10.0
"""Time for the other ranks to end by themselves after one has failed."""

PORTS = range(10000, 20000)
"""Range of the rendezvous port, below the ephemeral ports. Linux could hand out one of those (32768 and above) before
rank 0 binds it."""

_PR_SET_PDEATHSIG = 1


def compute_capability() -> tuple[int, int] | None:
    """Compute capability of this host's first GPU, as nvidia-smi reports it; None without a GPU."""
    query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        major, minor = output.split()[0].split(".")
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def rank_environment(parallel: ParallelConfig, capability: tuple[int, int] | None) -> dict[str, str]:
    """Environment variables that a rank must start with at this layout, on a GPU of this compute capability."""
    if capability is None or (parallel.tensor == 1 and parallel.context == 1):
        return {}
    # Communication overlaps with the layers' compute, so norms leave some multiprocessors free for it.
    # INF is for passes without gradients, whose kernels should be those of the update.
    environment = {f"NVTE_{kind}_LAYERNORM_SM_MARGIN": "16" for kind in ("FWD", "BWD", "INF")}
    if capability[0] < 10:  # up to Hopper, kernels start in launch order only with a single connection
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return environment


def run_local(
    module: str, arguments: list[str], ranks: int, hint: str = "", environment: Mapping[str, str] | None = None
) -> int:
    """Run `python -m module arguments` as `ranks` processes with torchrun's environment variables.

    When a rank fails, the others are ended. Ranks also die with this process, so that none can disturb a resumed run.

    Args:
        hint: appended to the line printed if a signal ends a rank.
        environment: further variables; those that are already set take precedence.

    Returns:
        0 if all ranks succeed, otherwise the exit code of the first rank that failed, 1 for a signal.
    """
    port = _free_port()
    cores = len(os.sched_getaffinity(0))
    processes: list[subprocess.Popen[bytes]] = []
    for rank in range(ranks):
        variables = {
            "OMP_NUM_THREADS": str(max(1, cores // ranks)),
            "PYTHONHASHSEED": "0",  # some tasks of reasoning-gym draw from sets
            **(environment or {}),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-m", module, *arguments]
        processes.append(subprocess.Popen(command, env=variables, preexec_fn=_die_with_parent))
    try:
        return _join(processes, hint)
    finally:
        _end(processes)


def _join(processes: list[subprocess.Popen[bytes]], hint: str) -> int:
    deadline = None
    while True:
        codes = [process.poll() for process in processes]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            killed = [(rank, code) for rank, code in failed if code < 0]
            # Only at the first look, because a later signal follows from an earlier failure.
            if killed and deadline is None:
                rank, code = killed[0]
                name = signal.Signals(-code).name
                message = f"megatron-aspo: rank {rank} was ended by {name}; the others are stopped too"
                print(message, *filter(None, [hint]), sep="; ", file=sys.stderr)
                return 1
            # Rank 0 reports errors that all ranks have, and may be later than the first rank to exit.
            deadline = deadline or time.monotonic() + GRACE_SECONDS
            if None not in codes or time.monotonic() > deadline:
                return next(code for _, code in failed if code > 0)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    """A random free port of `PORTS`: random because other launchers may be searching at the same time."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):  # it is taken
            probe.bind(("", port))
            return port
