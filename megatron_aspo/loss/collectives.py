"""The collectives of the loss library, under the names of older and newer torch."""
# torch.distributed is not annotated; the older names are deprecated where the newer ones exist.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportDeprecated=false

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def all_gather(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[n, ...] of every rank -> [ranks n, ...]."""
    gathered = values.new_empty(group_size(group) * values.shape[0], *values.shape[1:])
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, values.contiguous(), group=group)
    return gathered


def reduce_scatter(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks n, ...] -> [n, ...]: this rank's part of the sum."""
    own = values.new_empty(values.shape[0] // group_size(group), *values.shape[1:])
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(own, values, group=group)
    return own
