"""Checks of what callers hand in. All are local: they raise before any collective is started."""
# torch.distributed is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.config import PolicyLossConfig


@contextlib.contextmanager
def named_as(names: Mapping[str, str]) -> Generator[None]:
    """Around the making of a PolicyLossConfig from another framework's settings: an error names the setting there (our
    name -> theirs). Its remedy in brackets goes, since theirs may have another default."""
    try:
        yield
    except ValueError as error:
        ours, sign, rest = str(error).partition(" (")[0].partition("=")
        raise ValueError(f"{names.get(ours, ours)}{sign}{rest}") from None


def check_positive(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be > 0 and finite")


def check_counts(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value} must be an integer >= 1")


def check_group(name: str, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError(f"{name}: this rank is not a member of the group; pass the group that this rank belongs to")


def check_arguments(what: str, given: Any, function: Callable[..., Any], filled: Collection[str]) -> None:
    """`given` are arguments by name: all that `function` needs, and nothing that it does not take, but for those that
    are `filled` in for the caller."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must be a dict, not {type(given).__name__}")
    takes = {name: p for name, p in inspect.signature(function).parameters.items() if name not in filled}
    unknown = [name for name in given if name not in takes]
    missing = [name for name, p in takes.items() if p.default is p.empty and name not in given]
    # A misspelt name is both: what was written comes first.
    for verb, names in (("has", unknown), ("lacks", missing)):
        if names:
            listed = ", ".join(f"'{name}'" for name in names)
            raise ValueError(f"{what} {verb} {listed}; it takes {', '.join(takes)}")


def check_tensors(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, not {type(value).__name__}")


def check_config(config: Any) -> None:
    if not isinstance(config, PolicyLossConfig):
        raise ValueError(f"config must be a PolicyLossConfig, not {type(config).__name__}")


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


def check_token_ids(targets: Tensor, vocab_size: int, mask: Tensor | None = None) -> None:
    """Every (unmasked) target is a token. Synchronises once where the targets are on a GPU."""
    outside = (targets < 0) | (targets >= vocab_size)
    if mask is not None:
        outside &= mask
    if outside.any():
        bad = int(targets[outside][0])
        raise ValueError(
            f"targets holds token id {bad}, outside the vocabulary [0, {vocab_size}); "
            "mask such positions, or check vocab_size and tp_group"
        )


def check_vocab_size(vocab_size: int | None, vocab_shard: int, ranks: int, name: str) -> int:
    """The number of tokens that can be targets."""
    if vocab_size is None:
        return vocab_shard * ranks
    check_counts(vocab_size=vocab_size)
    if vocab_size > vocab_shard * ranks:
        raise ValueError(
            f"vocab_size={vocab_size} does not fit {name}: {vocab_shard} entries on each of {ranks} ranks of tp_group"
        )
    return vocab_size


def check_some_token(mask: Tensor, allow_empty: bool) -> None:
    if not allow_empty and not mask.any():
        raise ValueError(
            "loss_mask selects no token; where a micro-batch may have none (under a schedule), pass allow_empty=True"
        )
