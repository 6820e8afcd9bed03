"""The records of a rehearsal: collectives, messages and computation in their order, and the memory of each phase."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Event:
    """A collective, a message, a wait for one of these, or (kind "compute") the kernels between two of them.

    Attributes:
        kind: c10d's name of the operator, "send", "recv", "wait" or "compute".
        group: name of the process group, the same on all ranks.
        ranks: global ranks of the group.
        sent, received: bytes of this rank's input and output.
        peer: global rank of a message's partner, or of the root of a broadcast or reduction; -1 without one.
        detail: the reduction; " cpu" where the tensors are the host's.
        splits: of an all-to-all, rows received from and sent to each rank.
        asynchronous: the call returns before it is complete.
        work: number of the handle that the call returned; of a wait, of the handle that is waited for.
        batch: messages of one batch have the same number and no order; -1 outside a batch.
        seconds: of computation, the least and the most by the roofline of `costs`.
    """

    kind: str
    group: str = ""
    ranks: tuple[int, ...] = ()
    sent: int = 0
    received: int = 0
    dtype: str = ""
    peer: int = -1
    detail: str = ""
    splits: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    asynchronous: bool = False
    work: int = -1
    batch: int = -1
    phase: str = ""
    line: str = ""
    seconds: tuple[float, float] = (0.0, 0.0)


@dataclass(slots=True)
class Memory:
    """Bytes on the device, or of the host's tensors, in one phase.

    Attributes:
        start, peak, end: live bytes.
        holders: at the peak, bytes by the line of code that allocated them.
        before: at the start, bytes by line.
        kept: at the end, bytes more than at the start, by line.
    """

    start: int = 0
    peak: int = 0
    end: int = 0
    holders: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)


@dataclass
class Trace:
    """The events of one rank.

    Attributes:
        micro_batches, first_micro_batches: of all passes but the first update, and of that one.
        phases: name -> memory of the device, in the order of the program.
        host: name of the phase -> memory of the host's tensors, pinned or not.
        engine: name of the phase -> state of a vLLM on the same GPU: "asleep", "refit" (its weights are awake, its
            cache is not, or not needed) or "awake".
        syncs: (phase, call, line) -> waits of the host for the device.
        kernels: phase -> number.
        flops: phase -> operations of its matrix products and attention.
        guessed: line -> unknown values for which 1 was taken.
        unordered: (phase, operator, line) -> sums on the device whose order, and so their rounding, is not fixed.
    """

    rank: int
    stage: int
    micro_batches: int
    phases: dict[str, Memory]
    events: list[Event]
    syncs: dict[tuple[str, str, str], int]
    kernels: dict[str, int]
    flops: dict[str, float]
    guessed: dict[str, int]
    parameters: int
    host: dict[str, Memory] = field(default_factory=dict)
    engine: dict[str, str] = field(default_factory=dict)
    first_micro_batches: int = 1
    unordered: dict[tuple[str, str, str], int] = field(default_factory=dict)


_PACKAGES = ("/megatron_aspo/", "/megatron/", "/transformer_engine/")
_OWN = "/megatron_aspo/tools/rehearsal/"


def code_line() -> str:
    """The innermost line of a package whose code is rehearsed, and the line of this project that led there."""
    frame: Any = sys._getframe(1)
    inner: tuple[str, int] | None = None
    while frame is not None:
        name = frame.f_code.co_filename
        if place := _place(name):
            inner = inner or (name, frame.f_lineno)
            if place == _PACKAGES[0]:
                return _describe(*inner, name, frame.f_lineno)
        frame = frame.f_back
    return _describe(*inner, *inner) if inner else ""


def called_from(file: str) -> bool:
    """Whether a function of a file whose path ends with `file` is being run."""
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.endswith(file):
        frame = frame.f_back
    return frame is not None


@functools.cache
def _place(path: str) -> str:
    """The package of a file; "" of any other, and of the rehearsal's own."""
    parts = [part for part in _PACKAGES if part in path]
    if _OWN in path or not parts:
        return ""
    return _PACKAGES[0] if _PACKAGES[0] in path else max(parts, key=path.rindex)


@functools.cache
def _describe(path: str, line: int, own_path: str, own_line: int) -> str:
    def short(path: str, line: int) -> str:
        part = max((part for part in _PACKAGES if part in path), key=path.rindex)
        return f"{part[1:]}{path.rsplit(part, 1)[1]}:{line}"

    inner, own = short(path, line), short(own_path, own_line)
    return own if own == inner else f"{inner} < {own}"
