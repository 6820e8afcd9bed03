"""Checks of the callers' arguments. All are local: they raise before any collective is started."""
# torch.distributed is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be > 0 and finite")


def check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value} must be an integer >= 1")


def check_group(name: str, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError(f"{name}: this rank is not a member of the group; pass the group that this rank belongs to")


def check_tensors(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, not {type(value).__name__}")


def check_floating(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")


def check_integers(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
            raise ValueError(f"{name} must be integers, not {tensor.dtype}")


def check_shapes(expected: Sequence[int], reason: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and list(tensor.shape) != list(expected):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(expected)} ({reason})")


def check_positions(positions: Tensor | None, tokens: int) -> None:
    """Check type and shape; the values are trusted."""
    if positions is None:
        return
    check_tensors(positions=positions)
    if positions.dtype != torch.int64 or positions.dim() != 1 or positions.numel() > tokens:
        raise ValueError(
            f"positions must be int64 indices [n] of some of {tokens} tokens, not {positions.dtype} of shape "
            f"{list(positions.shape)}"
        )


def find_positions(
    loss_mask: Tensor | None, targets: Tensor, vocab_size: int, positions: Tensor | None = None
) -> Tensor:
    """Check that unmasked targets are token ids, and return the ascending indices [n] of the unmasked tokens.

    Waits for a GPU once; not at all with `positions`, whose values are returned unchecked.
    """
    check_positions(positions, targets.numel())
    if positions is not None:
        return positions.to(targets.device, non_blocking=True)
    mask = torch.ones_like(targets, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    outside = ((targets < 0) | (targets >= vocab_size)) & mask
    count, wrong = torch.stack([mask.sum(), outside.sum()]).tolist()
    if wrong:
        raise ValueError(
            f"targets holds token id {int(targets[outside][0])}, outside the vocabulary [0, {vocab_size}); "
            "mask such positions, or check vocab_size and tp_group"
        )
    return mask.reshape(-1).logical_not().to(torch.uint8).argsort(stable=True)[:count]


def check_vocab_size(vocab_size: int | None, vocab_shard: int, ranks: int, name: str) -> int:
    """The number of tokens that can be targets."""
    if vocab_size is None:
        return vocab_shard * ranks
    check_count("vocab_size", vocab_size)
    if vocab_size > vocab_shard * ranks:
        raise ValueError(
            f"vocab_size={vocab_size} does not fit {name}: {vocab_shard} entries on each of {ranks} ranks of tp_group"
        )
    return vocab_size
