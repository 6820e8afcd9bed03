"""Ending a run between two steps because a signal asked for it (a scheduler's, before it takes the machines away)."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

INTERRUPTED_FILE = "interrupted"
"""In the run's folder: the step whose checkpoint a run saved when it was asked to stop. Whoever starts the run again
may look for it and remove it; the run itself does not read it."""


class StopSignals:
    """While open, the signals named (such as "SIGUSR1") do not end this rank: they are a request to stop.

    Args:
        signals: what to listen to; none leaves every signal as it was. Opened on the main thread only.
    """

    def __init__(self, signals: Sequence[str]) -> None:
        self._signals = [signal.Signals[name] for name in signals]
        self._previous: dict[signal.Signals, Any] = {}
        self._received = False

    def __enter__(self) -> Self:
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether any rank has received a signal: the same answer on every rank. Collective."""
        if not self._signals:
            return False
        received = torch.tensor(int(self._received))
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return bool(received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True


def mark_interrupted(run_dir: Path, step: int) -> None:
    """Leave word that every rank has saved `step` and ends by request. Collective."""
    dist.barrier()
    if dist.get_rank() == 0:
        (run_dir / INTERRUPTED_FILE).write_text(f"{step}\n")
    dist.barrier()
