"""Live bytes of a rehearsed rank's tensors, on its device or on its host, by phase and line of code."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_aspo.tools.rehearsal.events import Memory

CACHE = "torch's cache of freed pinned memory"


class Ledger:
    """Bytes in one kind of memory.

    Attributes:
        live: bytes now.
        phases: name -> memory.
    """

    def __init__(self) -> None:
        self.live = 0
        self.phases: dict[str, Memory] = {}
        self._holders: Counter[str] = Counter()
        self._cached: Counter[int] = Counter()
        self._current: Memory | None = None

    def change(self, line: str, size: int) -> None:
        """Note that the tensors made by a line of code take `size` bytes more."""
        self.live += size
        self._holders[line] += size
        if size > 0:
            self._note_peak()

    def pin(self, line: str, size: int) -> None:
        """Note pinned memory. torch rounds it up to a power of two, and never gives it back to the system
        (ATen/core/CachingHostAllocator.h)."""
        block = _block(size)
        if self._cached[block]:
            self._cached[block] -= 1
            self.change(CACHE, -block)
        self.change(line, block)

    def unpin(self, line: str, size: int) -> None:
        """Note that pinned memory is freed: torch keeps it for tensors of the same block."""
        block = _block(size)
        self._cached[block] += 1
        self.change(line, -block)
        self.change(CACHE, block)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        at_start = self._holders.copy()
        before, self._current = self._current, self.phases.setdefault(name, Memory(self.live, before=dict(at_start)))
        self._note_peak()
        try:
            yield
        finally:
            self._current.end = self.live
            self._current.kept = dict(self._holders - at_start)
            self._current = before

    def _note_peak(self) -> None:
        memory = self._current
        if memory is not None and self.live > memory.peak:
            memory.peak = self.live
            memory.holders = {line: size for line, size in self._holders.items() if size > 0}


def _block(size: int) -> int:
    return 1 << (size - 1).bit_length() if size else 0


@dataclass(slots=True)
class Stored:
    """A storage of a tensor.

    Attributes:
        reference: weak, to the storage.
    """

    ledger: Ledger
    size: int
    line: str
    reference: Any
    pinned: bool

    def add(self) -> None:
        (self.ledger.pin if self.pinned else self.ledger.change)(self.line, self.size)

    def resize(self, size: int) -> None:
        self.ledger.change(self.line, size - self.size)
        self.size = size

    def remove(self) -> None:
        if self.pinned:
            self.ledger.unpin(self.line, self.size)
        else:
            self.ledger.change(self.line, -self.size)
