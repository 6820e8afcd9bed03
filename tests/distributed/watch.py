"""A dispatch mode that records operators: their collectives, their memory, and the largest tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.counting import Count


class Watch(Count):
    """Also records the largest number of elements of any operation's input or output."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        sizes = [leaf.numel() for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out
