"""Operators on fake tensors that were done before: their results are made again from the first call's metadata.

FakeTensorMode has such a cache too. It takes 0.2 ms a call, and a rank of a large model makes 10^5 of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_aspo.tools.rehearsal.costs import Costs
from megatron_aspo.tools.rehearsal.fake_gpu import FakeMaker, FakeTensor
from megatron_aspo.tools.rehearsal.shadows import tensors_in

aten = torch.ops.aten

_routes: dict[int, str] = {
    id(func): route
    for route, funcs in {
        "value": (aten._local_scalar_dense.default, aten.is_nonzero.default),
        "shape": (
            aten.nonzero.default,
            aten.masked_select.default,
            aten._unique2.default,
            aten.unique_dim.default,
            aten.unique_consecutive.default,
            aten.repeat_interleave.Tensor,
        ),
        "masked": (aten.index.Tensor, aten.index_put_.default, aten.index_put.default),
    }.items()
    for func in funcs
}
"""id of an operator -> `route`. Operators are never freed, and torch's hash of one takes long."""

_NAMESPACES = {"prim": "ask", "profiler": "ask", "c10d": "collective", "_c10d_functional": "collective"}


def route(func: Any) -> str:
    """ "ask" (asks a tensor for a property), "collective", "value" (returns a value of a tensor), "shape" (its result's
    shape depends on values), "masked" (it may index by a mask) or "plain"."""
    known = _routes.get(id(func))
    return known or _routes.setdefault(id(func), _NAMESPACES.get(func.namespace, "plain"))


_BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
_STATES = {aten.zeros_like.default, aten.ones_like.default}
"""Operators that make the host's optimizer states, once in a run."""

_BY_OFFSET = {aten.as_strided.default, aten.as_strided_.default}
"""Views whose offset counts from the beginning of the storage, not of the argument."""


@dataclass(frozen=True, slots=True)
class _Out:
    """One result: an argument (`same`), a view of an argument, or new.

    Attributes:
        argument: its number among the call's tensors; -1 of a new tensor.
        offset: in numbers, from the argument's.
    """

    argument: int
    same: bool
    shape: torch.Size
    stride: tuple[int, ...]
    offset: Any
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Done:
    """A call's results and its cost.

    Attributes:
        container: None for one tensor, or `tuple` or `list`.
    """

    outs: tuple[_Out | None, ...]
    container: Any
    cost: tuple[str, float, int] | None


class Operators:
    """Runs operators, each kind of call once by torch's FakeTensorMode."""

    def __init__(self, fake: Any, costs: Costs) -> None:
        self._make, self._costs = FakeMaker(fake), costs
        self._done: dict[Any, _Done] = {}
        self._repeatable: dict[int, bool] = {}

    def run(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]
    ) -> tuple[Any, list[Tensor], tuple[str, float, int] | None]:
        """The operator's result, those of its tensors that may have new memory, and its cost.

        Args:
            tensors: the tensors among `args` and `kwargs`.
        """
        key = self._key(func, args, kwargs)
        done = self._done.get(key) if key else None
        if done is not None:
            return self._again(done, tensors)
        out = func(*args, **kwargs)
        made = tensors_in(out)
        cost = self._costs.of_operator(func, args, kwargs, out, tensors)
        if cost is not None and not any(tensor.device.type == "cuda" for tensor in (*made, *tensors)):
            cost = None if func in _STATES else ("host", *cost[1:])
        if key and (done := _done(out, tensors, cost)):
            self._done[key] = done
        return out, made, cost

    def _key(self, func: Any, args: Any, kwargs: Any) -> Any:
        """All that the result depends on; None if that includes values."""
        repeatable = self._repeatable.get(id(func))
        if repeatable is None:
            tags = () if func is aten.index.Tensor else func.tags  # its masks are positions by now
            repeatable = func.namespace == "aten" and not any(tag in tags for tag in _BY_VALUE)
            self._repeatable[id(func)] = repeatable = repeatable and "lift" not in str(func)
        if not repeatable or "out" in kwargs:
            return None
        key = [id(func), torch.get_default_dtype()]
        if not _describe(args, key, func in _BY_OFFSET):
            return None
        if kwargs:
            key.extend(kwargs)
            if not _describe(kwargs.values(), key, False):
                return None
        return tuple(key)

    def _again(self, done: _Done, tensors: list[Tensor]) -> tuple[Any, list[Tensor], Any]:
        outs: list[Any] = []
        made: list[Tensor] = []
        for one in done.outs:
            if one is None:
                outs.append(None)
            elif one.same:
                outs.append(tensors[one.argument])
            elif one.argument >= 0:
                base = tensors[one.argument]
                outs.append(
                    self._make.view(
                        base, one.shape, one.stride, base.storage_offset() + one.offset, one.dtype, one.device
                    )
                )
            else:
                made.append(self._make.new(one.shape, one.stride, one.dtype, one.device))
                outs.append(made[-1])
        return (outs[0] if done.container is None else done.container(outs)), made, done.cost


def _describe(values: Any, key: list[Any], with_offset: bool) -> bool:
    """Append what a result depends on to `key`. Returns False where it depends on more than metadata."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None:
                return False
            key += (value.shape, value.stride(), value.dtype, value.fake_device)
            if with_offset:
                key.append(value.storage_offset())
        elif isinstance(value, Tensor):
            return False
        elif isinstance(value, (list, tuple)):
            key += (kind, len(value))
            if not _describe(value, key, with_offset):
                return False
        else:
            key += (kind, value)  # 1, 1.0 and True are equal
    return True


def _flat(out: Any) -> list[Any]:
    return list(out) if isinstance(out, (list, tuple)) else [out]


def _done(out: Any, tensors: list[Tensor], cost: Any) -> _Done | None:
    """How to make `out` again; None for anything out of the ordinary."""
    outs: list[_Out | None] = []
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    for one in _flat(out):
        if one is None:
            outs.append(None)
            continue
        if type(one) is not FakeTensor or one.constant is not None:
            return None
        numbers = [i for i, tensor in enumerate(tensors) if tensor is one]
        storage, offset = one.untyped_storage(), one.storage_offset()
        if numbers:
            argument = numbers[0]
        elif storage._cdata in storages:
            argument = storages.index(storage._cdata)
            offset -= tensors[argument].storage_offset()
        else:
            argument = -1
            storages.append(storage._cdata)  # of two results that share it, none is made again
            if offset or storage.nbytes() != _bytes_of(one):
                return None
        if argument >= len(tensors):
            return None
        outs.append(_Out(argument, bool(numbers), one.shape, one.stride(), offset, one.dtype, one.fake_device))
    container = type(out) if isinstance(out, (list, tuple)) else None
    return _Done(tuple(outs), container, cost)


def _bytes_of(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
