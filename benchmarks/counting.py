"""Exact, machine-independent counts of memory and communication."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Count(TorchDispatchMode):
    """Counts bytes of live storages that were allocated under the mode, and records collectives.

    Attributes:
        live: bytes allocated now.
        peak: largest value of `live`.
        collectives: (name, input bytes of this rank) in call order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.collectives: list[tuple[str, int]] = []
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_")
            # The first argument of gathers and scatters is the output.
            given = args[1] if "gather" in name or "scatter" in name else args[0]
            self.collectives.append((name, sum(t.nbytes for t in _tensors(given))))
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen and storage._cdata not in inputs:
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
