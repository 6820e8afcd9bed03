"""The process that judges mathematics.

The kernel ends it when a verdict takes too long: in sympy, in C or in an endless loop. Nothing watches it, and no
half-filled cache of an interrupted verdict is left for the next one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import resource
import signal
import sys
from pathlib import Path

from megatron_aspo.rewards.mathematics.judge import compare, search
from megatron_aspo.rewards.verdict import Verdict

_WALL = 20
"""Ratio of the wall-clock limit, for code that waits, to the CPU limit."""

_ROOM = 100
"""MiB left to verdicts."""


def main() -> None:
    """Judge the requests on standard input until it is closed. Says True when it is ready."""
    seconds, memory_mib = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes the pipe
    replies = os.dup(1)
    os.dup2(2, 1)  # output of a library is no reply
    prepare(memory_mib)
    reply: Verdict | bool = True
    with contextlib.suppress(BrokenPipeError, EOFError, pickle.UnpicklingError):  # the trainer has ended
        while True:
            os.write(replies, pickle.dumps(reply))
            request = pickle.load(sys.stdin.buffer)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            signal.setitimer(signal.ITIMER_REAL, _WALL * seconds)
            reply = judge(*request)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)


def prepare(memory_mib: int) -> None:
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    for warm_up in ("1", "2,3", "(1,2)", "x+1"):  # the parser's tables fill as it parses
        compare(warm_up, ["2.5"])
    # math-verify takes a failed allocation for an unequal answer.
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() >> 20
    if memory_mib < taken + _ROOM:
        sys.exit(f"reward.math.memory_mib={memory_mib} is too little; the parser takes {taken}, a verdict {_ROOM}")


def judge(boxed: bool, answer: str, accepted: list[str]) -> Verdict:
    try:
        return (compare if boxed else search)(answer, accepted)
    except MemoryError:
        return Verdict(0.0, "out of memory")
    except RecursionError:
        return Verdict(0.0, "answer too deep")
