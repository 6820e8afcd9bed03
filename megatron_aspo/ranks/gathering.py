"""Collectives of ranks that may come hours apart, and lines that name the ranks waited for."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_aspo.errors import RunError

FIRST_NOTICE = 60.0
"""Seconds of waiting before the first line. Each next line comes after twice the time."""

_shared: _SharedGroup | None = None


class _SharedGroup:
    """The gloo group of the default process group's ranks, and each rank's progress in a store.

    A rank's entry in the store is "<number of gatherings it has entered> <phase>", under its number among all ranks.

    Attributes:
        received: bytes of samples and of tables that this rank has received.
    """

    def __init__(self, limit: timedelta, store: dist.Store | None, first: int) -> None:
        self.world, self.limit = dist.group.WORLD, limit
        self.store = dist.PrefixStore("phases", store or dist.distributed_c10d._get_default_store())
        self.rank, self.ranks = first + dist.get_rank(), range(first, first + dist.get_world_size())
        self.entered, self.phase, self.received = 0, "starting", 0
        self.post()
        self.group: Any = dist.new_group(backend="gloo", timeout=limit)  # returns when all ranks have posted

    def post(self) -> None:
        self.store.set(str(self.rank), f"{self.entered} {self.phase}")

    def late(self) -> dict[int, str]:
        """Phases of the ranks that have not entered this rank's current gathering."""
        entries = {rank: self.store.get(str(rank)).decode().split(" ", 1) for rank in self.ranks}
        return {rank: phase for rank, (entered, phase) in entries.items() if int(entered) < self.entered}

    def describe_others(self, ranks: Iterable[int]) -> str:
        """Describe ranks outside the group."""
        phases = {rank: self.store.get(str(rank)).decode().partition(" ")[2] for rank in ranks}
        return _describe(phases, len(phases))

    def reports(self) -> bool:
        """Whether this rank is the first of those that wait for late ones."""
        late = self.late()
        return bool(late) and min(set(self.ranks) - late.keys()) == self.rank


def share_ranks(
    limit: timedelta = timedelta(hours=24), store: dist.Store | None = None, first: int = 0
) -> _SharedGroup:
    """Return the default process group's one group for objects. The first call creates it and is collective.

    Args:
        store: shared with other process groups of the run; default: the process group's own.
        first: number of the group's first rank among all ranks of the run.
    """
    global _shared
    if _shared is None or _shared.world is not dist.group.WORLD:
        _shared = _SharedGroup(limit, store, first)
    return _shared


def post_phase(phase: str) -> None:
    """Publish this rank's current phase for ranks that may wait for it."""
    if _shared is not None and dist.is_initialized() and _shared.world is dist.group.WORLD and phase != _shared.phase:
        _shared.phase = phase
        _shared.post()


@contextlib.contextmanager
def waiting(limit: timedelta, describe: Callable[[], str], reports: Callable[[], bool]) -> Iterator[None]:
    """Print a line while the body waits: after `FIRST_NOTICE` seconds, then after twice as long, and so on.

    Args:
        describe: returns the ranks waited for; called in another thread, as `reports` is.
        reports: whether this rank prints the lines.

    Raises:
        RunError: the body raised RuntimeError, and `limit` is over.
    """
    done = threading.Event()
    started = time.monotonic()

    def watch() -> None:
        waited, pause = 0.0, FIRST_NOTICE
        while not done.wait(pause):
            waited += pause
            pause = waited
            with contextlib.suppress(RuntimeError):  # the store ends with rank 0
                if reports():
                    print(f"waiting for {waited:.0f} s for {describe()}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    except RuntimeError as error:
        if time.monotonic() - started >= limit.total_seconds():  # otherwise a process has ended
            with contextlib.suppress(RuntimeError):
                hours = limit / timedelta(hours=1)
                raise RunError(f"waited train.wait_limit_hours={hours:g} for {describe()}") from error
        raise
    finally:
        done.set()
        thread.join()


def gather_objects(local: Any) -> list[Any]:
    """All-gather an object over the default process group; return every rank's, in the order of the ranks.

    A wait may last `train.wait_limit_hours`, unlike in other groups, whose collectives time out after half an hour. A
    rank's death ends it at once.

    Raises:
        RunError: a rank did not come within `train.wait_limit_hours`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [local]
    gathered: list[Any] = [None] * dist.get_world_size()
    with waiting_for_ranks():
        dist.all_gather_object(gathered, local, group=share_ranks().group)
    return gathered


def sum_tables(table: Tensor) -> Tensor:
    """Sum of the ranks' tables of numbers, on every rank; waits like `gather_objects`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return table
    with waiting_for_ranks():
        dist.all_reduce(table, group=share_ranks().group)
    share_ranks().received += table_bytes(table)
    return table


def table_bytes(table: Tensor) -> int:
    """Bytes that a rank receives in `sum_tables`, at most: a ring reduces the parts of the table, then gathers them."""
    return 2 * table.nbytes


@contextlib.contextmanager
def waiting_for_ranks() -> Iterator[None]:
    """For a collective in the shared group: lines name the ranks that have not entered it.

    Raises:
        RunError: a rank did not come within `train.wait_limit_hours`.
    """
    shared = share_ranks()
    shared.entered += 1
    shared.post()
    with waiting(shared.limit, lambda: _describe(shared.late(), len(shared.ranks)), shared.reports):
        yield


def _describe(phases: dict[int, str], total: int) -> str:
    named = [f"rank {rank} ({phase})" for rank, phase in phases.items()]
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return f"{len(named)} of {total} ranks: {', '.join(named[:8])}{more}"
