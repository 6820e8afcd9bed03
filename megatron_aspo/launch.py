"""Ranks on this host: start them, join them, end them together."""

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

GRACE_SECONDS = 10.0
"""How long the other ranks may take to end by themselves after one has failed."""

PORTS = range(10000, 20000)
"""For the ranks to meet at. Linux hands out those from 32768 on to whoever connects or asks for any: one of them may be
gone when rank 0 wants it."""

_PR_SET_PDEATHSIG = 1


def run_local(module: str, arguments: list[str], ranks: int, hint: str = "") -> int:
    """Run `python -m module arguments` as `ranks` processes with torchrun's environment.

    Returns 0 when all succeed, else the exit code of the first rank that failed (1 for a signal, which is told in a
    line that ends with `hint`); the others are ended. If this process dies, whatever the cause, its ranks die too: none
    goes on writing behind the back of a resumed run.
    """
    port = _free_port()
    cores = len(os.sched_getaffinity(0))
    processes: list[subprocess.Popen[bytes]] = []
    for rank in range(ranks):
        environment = {
            "OMP_NUM_THREADS": str(max(1, cores // ranks)),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-m", module, *arguments]
        processes.append(subprocess.Popen(command, env=environment, preexec_fn=_die_with_parent))
    try:
        return _join(processes, hint)
    finally:
        _end(processes)


def _join(processes: list[subprocess.Popen[bytes]], hint: str) -> int:
    grace = None
    while True:
        codes = [process.poll() for process in processes]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            killed = [(rank, code) for rank, code in failed if code < 0]
            # At the first look: others may have ended of it by now. A later signal follows from an earlier failure.
            if killed and grace is None:
                rank, code = killed[0]
                name = signal.Signals(-code).name
                told = f"megatron-aspo: rank {rank} was ended by {name}; the others are stopped too"
                print(told, *filter(None, [hint]), sep="; ", file=sys.stderr)
                return 1
            # A mistake that all ranks find is told by rank 0, which may be later than the one that exited first.
            grace = grace or time.monotonic() + GRACE_SECONDS
            if None not in codes or time.monotonic() > grace:
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
    """By chance, since another launcher may be looking for one at the same time."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):  # it is taken
            probe.bind(("", port))
            return port
