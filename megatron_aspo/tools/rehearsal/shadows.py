"""Values beside fake tensors.

Shapes depend on integers such as masks, lengths and routing. Each small one has a *shadow*, a real tensor on the CPU,
and an operator whose tensors all have shadows is also done on them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_aspo.tools.rehearsal.fake_gpu import FakeTensor, no_dispatch

SMALL = 64
"""Numbers of a floating-point tensor that may have a shadow."""

LARGE = 1 << 23
"""Numbers beyond which nothing has a shadow, such as an index that was expanded over hidden states."""

aten = torch.ops.aten
_stale: dict[int, Any] = {}
_unset: dict[int, tuple[Any, Tensor]] = {}
"""Storage of a shadow -> where nothing was written since `torch.empty` made it."""

_OVERWRITES = {id(func) for func in (aten.copy_.default, aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor)}


class UnknownValueError(RuntimeError):
    """A shape or a branch depends on a value that no shadow gives."""


real = no_dispatch


def shadow_of(tensor: Tensor) -> Tensor | None:
    """The values of `tensor`, or None if nobody knows them. A real tensor is its own shadow."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    shadow = _memory_of(tensor)
    with real():
        unset = shadow is not None and shadow.untyped_storage()._cdata in _unset and bool(_place_of(shadow).any())
    return None if unset else shadow


def _memory_of(tensor: Tensor) -> Tensor | None:
    """The shadow of a tensor, also of one whose values were not written yet."""
    shadow = getattr(tensor, "_shadow", None) if isinstance(tensor, FakeTensor) else tensor
    if shadow is None or shadow.shape != tensor.shape:  # Megatron exchanges tensors' data
        return None
    # Views share their shadow's memory, and one of them may have been forgotten.
    return None if shadow.untyped_storage()._cdata in _stale else shadow


def _place_of(shadow: Tensor) -> Tensor:
    unset = _unset[shadow.untyped_storage()._cdata][1]
    return unset.as_strided(shadow.shape, shadow.stride(), shadow.storage_offset())


def give_unset(fake: Any, shadow: Tensor) -> None:
    """Let the values of a new tensor be unknown until they are written."""
    give_shadow(fake, shadow)
    storage = shadow.untyped_storage()
    key = storage._cdata
    with real():
        unset = torch.ones(storage.nbytes() // shadow.element_size(), dtype=torch.bool)
    _unset[key] = weakref.ref(storage, lambda _: _unset.pop(key, None)), unset


def overwrite(fake: Any, values: Tensor) -> None:
    """Note that `values` were written to `fake`, so that its other views have them too."""
    shadow = _memory_of(fake)
    if shadow is None:
        give_shadow(fake, values)
        return
    with real():
        shadow.copy_(values)
        if shadow.untyped_storage()._cdata in _unset:
            _place_of(shadow).fill_(False)


def give_shadow(fake: Any, shadow: Tensor) -> None:
    assert not isinstance(shadow, FakeTensor)
    fake._shadow = shadow


def forget(tensor: Any) -> None:
    """An unknown value was written to `tensor`, and thereby to all of its views."""
    shadow = getattr(tensor, "_shadow", None)
    if shadow is not None:
        storage = shadow.untyped_storage()
        key = storage._cdata
        _stale[key] = weakref.ref(storage, lambda _: _stale.pop(key, None))
        tensor._shadow = None


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors within lists, tuples and dictionaries."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _collect(one, found)
    elif isinstance(value, dict):
        for one in value.values():
            _collect(one, found)


def spread(shape: torch.Size, choices: int, seed: int | None) -> Tensor:
    """A router's choices [..., count] among `choices`, different ones in a row.

    Without a seed the rows take the choices in turn. With one, the loads fall in a straight line from twice the mean
    to nothing, in an order that depends on the seed; less steeply where a choice would be in every row.
    """
    rows, count = shape[:-1].numel(), shape[-1]
    with real():
        if seed is None:
            return (torch.arange(rows * count) % choices).view(shape)
        slope = min(1.0, choices / count - 1)
        loads = 1 + slope * torch.linspace(1 - 1 / choices, 1 / choices - 1, choices, dtype=torch.float64)
        # Systematic sampling: a row takes what lies at its offset and at each whole number after it.
        ends = loads.cumsum(0) * count / choices
        offsets = (torch.arange(rows, dtype=torch.float64) * 0.6180339887498949) % 1
        places = torch.searchsorted(ends, offsets[:, None] + torch.arange(count), right=True).clamp_(max=choices - 1)
        return torch.randperm(choices, generator=torch.Generator().manual_seed(seed))[places].view(shape)


def device_in(kwargs: Any) -> str:
    """ "cuda", "cpu" or "" for no device among an operator's keywords."""
    device = kwargs.get("device")
    if device is None:
        return ""
    return "cuda" if isinstance(device, int) else torch.device(device).type


def compute_shadows(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    """The operator's result on the shadows; None unless all of its tensors have one and the result is small."""
    if id(func) in _OVERWRITES and shadow_of(args[0]) is None and _memory_of(args[0]) is not None:
        return _overwrite_by(func, args, kwargs)
    known = _memory_of if func.is_view else shadow_of
    if any(tensor.numel() > LARGE or known(tensor) is None for tensor in tensors):
        return None
    if device_in(kwargs) == "cuda":
        kwargs = {**kwargs, "device": "cpu"}
    with real():
        out = func(*_in_shadow(args), **{name: _in_shadow(value) for name, value in kwargs.items()})
    if func._schema.is_mutable:
        return out
    largest = max(SMALL, *(tensor.numel() for tensor in tensors))
    grown = any(tensor.is_floating_point() and tensor.numel() > largest for tensor in tensors_in(out))
    return None if grown else out


def _overwrite_by(func: Any, args: Any, kwargs: Any) -> Any:
    """The first argument's new shadow: that of a tensor whose old values do not matter."""
    if any(shadow_of(tensor) is None for tensor in tensors_in((args[1:], kwargs))):
        return None
    with real():
        values = func(torch.empty(args[0].shape, dtype=args[0].dtype), *_in_shadow(args[1:]), **kwargs)
    overwrite(args[0], values)
    return args[0]._shadow


def _in_shadow(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _memory_of(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_in_shadow(one) for one in value)
    return value


def give_shadows(out: Any, shadows: Any) -> None:
    for fake, shadow in zip(tensors_in(out), tensors_in(shadows), strict=True):
        if isinstance(fake, FakeTensor):
            give_shadow(fake, shadow)


def written_by(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operator writes to."""
    written = _written.get(id(func))
    if written is None:
        arguments = enumerate(func._schema.arguments)
        written = [(i, arg.name) for i, arg in arguments if arg.alias_info is not None and arg.alias_info.is_write]
        _written[id(func)] = written
    for i, name in written:
        yield from tensors_in(args[i] if i < len(args) else kwargs.get(name))


_written: dict[int, list[tuple[int, str]]] = {}
"""id of an operator -> place and name of the arguments that it writes to."""
