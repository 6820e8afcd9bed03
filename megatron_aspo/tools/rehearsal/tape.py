"""Records one rank whose code runs on fake tensors: memory, kernels, collectives, waits of the host."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_aspo.tools.rehearsal.collectives import Collectives
from megatron_aspo.tools.rehearsal.costs import Costs
from megatron_aspo.tools.rehearsal.events import Event, called_from, code_line
from megatron_aspo.tools.rehearsal.fake_gpu import FakeTensor, FakeTensorMode
from megatron_aspo.tools.rehearsal.ledger import Ledger, Stored
from megatron_aspo.tools.rehearsal.operators import Operators, route
from megatron_aspo.tools.rehearsal.shadows import (
    SMALL,
    UnknownValueError,
    compute_shadows,
    device_in,
    forget,
    give_shadow,
    give_shadows,
    give_unset,
    real,
    shadow_of,
    spread,
    tensors_in,
    written_by,
)

aten = torch.ops.aten

_REAL_ON_HOST = 1 << 16
"""Numbers of a floating-point tensor that the host makes for real."""

_SHADOWED = 1 << 22
"""Numbers of an integer tensor that gets a shadow when it is made."""

_CONSTANT = {id(aten.zeros_like.default): torch.zeros, id(aten.ones_like.default): torch.ones}
_ROUTER = "/megatron/core/transformer/moe/router.py"
_TENSORS = (FakeTensor, Tensor, torch.nn.Parameter)
_UNORDERED = {
    id(func)
    for func in (aten.scatter_add_.default, aten.scatter_add.default, aten.index_add_.default, aten.index_add.default)
}
_ONE_NUMBER = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.scalar_tensor.default}


class Tape(TorchDispatchMode):
    """The mode; it is entered after its `fake` mode.

    Attributes:
        events: in order.
        device, host: memory of the two.
        syncs: (phase, call, line of code) -> number of times that the host waits for the device.
        kernels: phase -> number.
        flops: phase -> operations of its matrix products and attention.
        guessed: line of code -> number of unknown values for which 1 was taken.
        skew: seed of an unequal routing of tokens to experts; None for a balanced one.
        unordered: (phase, operator, line of code) -> number of sums of floats by atomic additions.
    """

    def __init__(self, fake: FakeTensorMode, costs: Costs) -> None:
        super().__init__()
        gc.collect()
        gc.freeze()  # phases search for cycles; modules and what they hold now take most of that time and have none
        self.fake = fake
        self.costs = costs
        self.events: list[Event] = []
        self.device, self.host = Ledger(), Ledger()
        self.syncs: Counter[tuple[str, str, str]] = Counter()
        self.kernels: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.guessed: Counter[str] = Counter()
        self.skew: int | None = None
        self.unordered: Counter[tuple[str, str, str]] = Counter()
        self.collectives = Collectives(self)
        self._operators = Operators(fake, costs)
        self.current = ""
        self._storages: dict[int, Stored] = {}
        self._compute = Event("compute")
        self._pins = False  # the operator in progress makes pinned memory
        self._within: dict[int, Stored] | None = None  # storages made inside `one_kernel`

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and each call would take longer

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        gc.collect()  # cycles would count as kept
        self.flush()
        before, self.current = self.current, name
        with self.device.phase(name), self.host.phase(name):
            try:
                yield
            finally:
                self.flush()
                gc.collect()
        self.current = before

    def sync(self, what: str) -> None:
        self.syncs[self.current, what, code_line()] += 1

    def flush(self) -> None:
        """End the stretch of computation, before another kind of event."""
        if any(self._compute.seconds):
            self._compute.phase = self.current
            self.events.append(self._compute)
        self._compute = Event("compute")

    def kernel(self, kind: str, flops: float, moved: int) -> None:
        """Note a kernel that performs `flops` operations and moves `moved` bytes, or an operator on the host."""
        if self._within is not None:
            return
        self.kernels[self.current] += kind != "host"
        self.flops[self.current] += int(flops)
        (least, most), (low, high) = self._compute.seconds, self.costs.seconds(kind, flops, moved)
        self._compute.seconds = least + low, most + high

    @contextlib.contextmanager
    def one_kernel(self) -> Iterator[Callable[[int], None]]:
        """Count all operators within as one kernel, whose intermediate results take no memory. The function that is
        yielded takes the bytes that the kernel moves."""
        if self._within is not None:
            yield lambda moved: None
            return
        self._within = {}
        moved_bytes = 0

        def note(moved: int) -> None:
            nonlocal moved_bytes
            moved_bytes = moved

        try:
            yield note
        finally:
            kept, self._within = self._within, None
            self._storages |= kept
            for stored in kept.values():
                stored.add()
            self.kernel("elementwise", 0.0, moved_bytes)

    # Memory

    def account(self, tensor: Tensor) -> None:
        """Count the storage of a new tensor until it is freed."""
        ledger = {"cuda": self.device, "cpu": self.host}.get(tensor.device.type)
        if ledger is None or hasattr(tensor, "get_data_tensors"):  # the buffers of an FP8 tensor are counted
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if self._within and key in self._within:
            return
        size = storage.nbytes()
        if key in self._storages:
            if size != self._storages[key].size:  # by Tensor.resize_, or as an operator's `out`
                self.resized(storage, size)
            return
        reference = weakref.ref(storage, lambda _: self._freed(key))
        stored = Stored(ledger, size, code_line(), reference, self._pins and ledger is self.host)
        if self._within is not None:
            self._within[key] = stored
            return
        self._storages[key] = stored
        stored.add()

    def resized(self, storage: Any, size: int) -> None:
        """Count a storage that changes its size in place."""
        stored = self._storages.get(storage._cdata)
        if stored is not None:
            stored.resize(size)

    def _freed(self, key: int) -> None:
        if self._within is not None and self._within.pop(key, None):
            return
        self._storages.pop(key).remove()

    # Operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(one not in _TENSORS for one in types):
            return NotImplemented  # the engine's FP8 tensors act on their buffers, by other operators
        kind = route(func)
        if kind == "ask":
            is_fake = func is torch.ops.prim.device.default and type(args[0]) is FakeTensor
            return args[0].fake_device if is_fake else func(*args, **kwargs)
        if kind == "collective":
            return self.collectives.run(func, args, kwargs)
        self._pins = kwargs.pop("pin_memory", False) or _is_pinned(func, args, kwargs)  # pinning asks the driver
        if func is aten._pin_memory.default:
            func, args, kwargs = aten.clone.default, args[:1], {}
        tensors = tensors_in((args, kwargs))
        if _is_blocking_copy(func, args, kwargs):
            self.sync("copy between host and device")
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            done, out = self._on_host(func, args, kwargs, tensors)
            if done:
                for tensor in tensors_in(out):
                    self.account(tensor)
                return out
        if func is aten.equal.default and args[0] is args[1]:
            return True  # torch compares the tensors' addresses first
        if kind == "value":
            return self._value(func, args[0])
        if id(func) in _UNORDERED and args[0].device.type == "cuda" and args[0].is_floating_point():
            self.unordered[self.current, func.overloadpacket.__name__, code_line()] += 1
        shadows = compute_shadows(func, args, kwargs, tensors) if tensors else None
        to_host = func is aten._to_copy.default and device_in(kwargs) == "cpu" and args[0].device.type == "cuda"
        if to_host and shadows is not None:
            self.kernel("transfer", 0.0, args[0].nbytes)
            self.account(shadows)
            return shadows
        if kind == "shape":
            return self._shaped_by_values(func, args, kwargs, shadows)
        if kind == "masked":
            args = self._without_masks(func, args)
            tensors = tensors_in((args, kwargs))
        out, made, cost = self._operators.run(func, args, kwargs, tensors)
        for tensor in made:
            self.account(tensor)
        if cost is not None:
            self.kernel(*cost)
        self._give_values(func, args, kwargs, tensors, out, shadows)
        return out

    def _give_values(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], out: Any, shadows: Any) -> None:
        if shadows is not None:
            give_shadows(out, shadows)
        elif func is aten.topk.default and called_from(_ROUTER):
            give_shadow(out[1], spread(out[1].shape, args[0].shape[-1], self.skew))
        elif id(func) in _CONSTANT and out.numel() <= _SHADOWED:
            with real():
                give_shadow(out, _CONSTANT[id(func)](out.shape, dtype=out.dtype))
        elif not tensors:
            self._shadow_of_new(func, args, kwargs, out)
        else:
            for tensor in written_by(func, args, kwargs):
                forget(tensor)

    def _on_host(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> tuple[bool, Any]:
        """Whether the operator concerns the host alone and is small, and then its real result."""
        if device_in(kwargs) not in ("", "cpu"):
            if func is not aten._to_copy.default:
                return False, None
            source = args[0]
            dtype = kwargs.get("dtype") or source.dtype
            fake = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=kwargs["device"])
            self.kernel("transfer", 0.0, source.nbytes)
            if not source.is_floating_point() or source.numel() <= SMALL:
                with real():
                    give_shadow(fake, source.detach().to(dtype, copy=True))
            return True, fake
        if not tensors:
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            if _size_of_new(func, args) > (_REAL_ON_HOST if dtype.is_floating_point else 4 * _SHADOWED):
                return False, None
        with real():
            return True, func(*args, **kwargs)

    def _shadow_of_new(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not isinstance(out, FakeTensor) or "rand" in str(func):
            return
        if out.numel() <= (SMALL if out.is_floating_point() else _SHADOWED):
            on_host = {**kwargs, "device": "cpu"} if device_in(kwargs) not in ("", "cpu") else kwargs
            with real():
                (give_unset if "empty" in str(func) else give_shadow)(out, func(*args, **on_host))

    def _value(self, func: Any, tensor: Tensor) -> Any:
        if tensor.device.type == "cuda":
            self.sync(".item()")
        shadow = shadow_of(tensor)
        if shadow is None:
            self.guessed[code_line()] += 1
            return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
        with real():
            return func(shadow)

    def _shaped_by_values(self, func: Any, args: Any, kwargs: Any, shadows: Any) -> Any:
        if any(tensor.device.type == "cuda" for tensor in tensors_in((args, kwargs))):
            self.sync(func.overloadpacket.__name__)
        if shadows is not None:
            outs = [self._like(shadow) for shadow in tensors_in(shadows)]
            return outs[0] if isinstance(shadows, Tensor) else tuple(outs)
        mask = shadow_of(args[1]) if func is aten.masked_select.default else None
        if mask is None:
            raise UnknownValueError(f"the shape of {func} depends on an unknown value, at {code_line()}")
        with real():
            count = int(mask.expand(args[0].shape).sum())
        return self.empty((count,), args[0].dtype, args[0].device)

    def empty(self, shape: Any, dtype: torch.dtype, device: Any = "cuda") -> Tensor:
        fake = torch.empty(shape, dtype=dtype, device=device)
        self.account(fake)
        return fake

    def _like(self, shadow: Tensor) -> Tensor:
        fake = self.empty(shadow.shape, shadow.dtype)
        give_shadow(fake, shadow)
        return fake

    def _without_masks(self, func: Any, args: Any) -> Any:
        """Replace masks among the indices by positions; torch waits for the device to count them."""
        if func is not aten.index.Tensor and args[2].numel() == 1 and not (len(args) > 3 and args[3]):
            return args  # torch fills by the mask and does not wait
        indices: list[Any] = []
        for index in args[1]:
            if not isinstance(index, Tensor) or index.dtype != torch.bool:
                indices.append(index)
                continue
            self.sync("index by a mask")
            shadow = shadow_of(index)
            if shadow is None:
                raise UnknownValueError(f"{func} takes a mask of unknown values, at {code_line()}")
            with real():
                places = shadow.nonzero(as_tuple=True)
            indices.extend(self._like(place) for place in places)
        return (args[0], indices, *args[2:])


def _is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the operator's result is in pinned memory without `pin_memory`: also a copy to the host without wait."""
    if func is not aten._to_copy.default or device_in(kwargs) != "cpu":
        return func is aten._pin_memory.default
    return args[0].device.type == "cuda" and bool(kwargs.get("non_blocking"))


def _is_blocking_copy(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it copies between host and device, and the host waits."""
    if func not in (aten._to_copy.default, aten.copy_.default) or not args[0].numel():
        return False
    if func is aten._to_copy.default:
        return device_in(kwargs) not in ("", args[0].device.type) and not kwargs.get("non_blocking")
    return args[0].device.type != args[1].device.type and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))


def _size_of_new(func: Any, args: Any) -> int:
    if func in _ONE_NUMBER or not args or not isinstance(args[0], (list, tuple)):
        return 1
    return torch.Size(args[0]).numel()
