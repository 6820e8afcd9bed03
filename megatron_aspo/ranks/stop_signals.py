"""Ending a run between two steps on a signal, such as a scheduler's before the end of its time."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

INTERRUPTED_FILE = "interrupted"
"""File in the run's folder with the step that an interrupted run saved. A job may read and remove it; the run does not
read it."""


class StopSignals(contextlib.ExitStack):
    """While open, on the main thread, SIGUSR1 and SIGTERM request a stop instead of ending this rank."""

    def __init__(self) -> None:
        super().__init__()
        self._received = False

    def __enter__(self) -> Self:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            self.callback(signal.signal, number, signal.signal(number, self._receive))
        return self

    def requested(self) -> bool:
        """Whether any rank has received a signal; the same on every rank. Collective."""
        received = torch.tensor(int(self._received))
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return bool(received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True


def mark_interrupted(run_dir: Path, step: int) -> None:
    """Write `INTERRUPTED_FILE` when every rank has saved `step`. Collective."""
    dist.barrier()
    if dist.get_rank() == 0:
        (run_dir / INTERRUPTED_FILE).write_text(f"{step}\n")
    dist.barrier()
