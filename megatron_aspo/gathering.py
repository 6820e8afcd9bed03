"""Bringing together what ranks made in unequal times."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

FOREVER = timedelta(days=365)
"""Of waits that may be as long as sampling takes."""


class Gathering:
    """A group of all ranks for objects that take some of them hours longer than others, such as responses and verdicts.

    The other groups end a wait after half an hour, since what takes so long in them hangs. This one, over gloo, waits
    on; that a process has ended it notices at once, as its connection closes. All ranks make it together.
    """

    def __init__(self) -> None:
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._group = dist.new_group(backend="gloo", timeout=FOREVER) if self._ranks > 1 else None

    def __call__(self, mine: Any) -> list[Any]:
        """Every rank's object, in the order of the ranks; on all of them."""
        everyones: list[Any] = [mine]
        if self._group is not None:
            everyones = [None] * self._ranks
            dist.all_gather_object(everyones, mine, group=self._group)
        return everyones
