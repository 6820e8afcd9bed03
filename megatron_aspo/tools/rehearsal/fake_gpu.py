"""A simulated CUDA device: what torch, Megatron-Core and Transformer Engine ask of it between kernels.

Fake tensors (`torch._subclasses.FakeTensorMode`) may lie on "cuda" without a GPU. All private functions of torch that
this takes are in this file: tests/unit/test_rehearsal_torch.py says which one broke when torch moves.
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["FakeMaker", "FakeTensor", "FakeTensorMode", "FakeWork", "ProcessGroup", "Stream", "no_dispatch", "pretend"]

no_dispatch = torch._C._DisableTorchDispatch
"""A context in which operators pass by all modes and act on real tensors."""

_HAS_PRIMARY_CONTEXT = 4
"""Place of `hasPrimaryContext` in the table of `at::AcceleratorHooksInterface`: behind two destructors, `isBuilt` and
`isAvailable` (ATen/detail/AcceleratorHooksInterface.h of torch 2.13)."""

_kept_for_cpp: list[Any] = []


class Stream:
    """Stands for a CUDA stream or event. Order in time is what `simulation` works out."""

    cuda_stream = 0
    on_sync: Callable[[str], None] = staticmethod(lambda what: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None:
        self.on_sync("stream or event synchronize")

    def record_event(self, event: Any = None) -> Stream:
        return self

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


def pretend(on_sync: Callable[[str], None], capability: tuple[int, int], memory: int) -> None:
    """Make torch of this process believe in eight GPUs of `capability` with `memory` bytes each.

    Args:
        on_sync: called with a description whenever the host waits for the device by name.
    """
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  (FakeTensorMode does it only where it sees no GPU)
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    if torch.version.cuda:
        deny_primary_context()
    Stream.on_sync = staticmethod(on_sync)
    properties = types.SimpleNamespace(
        name="simulated GPU",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        total_memory=memory,
        L2_cache_size=50 << 20,
        warp_size=32,
    )
    replacements: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: properties.name,
        "synchronize": lambda device=None: on_sync("torch.cuda.synchronize"),
        "current_stream": Stream,
        "default_stream": Stream,
        "Stream": Stream,
        "Event": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda *_, **__: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *_: None)
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *_, non_blocking=False, **__: self.to("cuda", non_blocking=non_blocking)  # type: ignore[method-assign, assignment]
    torch.nn.Module._apply = _apply_with_new_parameters  # type: ignore[method-assign, assignment]
    # torch answers these by operators, which are half of all operators of a step
    answers: dict[str, Any] = {"device": _device, "is_cuda": lambda tensor: _device(tensor).type == "cuda"}
    for name, answer in answers.items():
        setattr(FakeTensor, name, property(answer))


def _device(tensor: FakeTensor) -> torch.device:
    return torch.device("meta") if tensor.fake_mode.in_kernel_invocation else tensor.fake_device


class FakeMaker:
    """Makes tensors of a `FakeTensorMode` in a tenth of its time."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    def new(self, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> FakeTensor:
        with no_dispatch():
            return self._wrap(torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)

    def view(
        self, base: Tensor, shape: Any, stride: Any, offset: Any, dtype: torch.dtype, device: torch.device
    ) -> FakeTensor:
        with no_dispatch():
            meta = torch.empty(0, dtype=dtype, device="meta")
            return self._wrap(meta.set_(base.untyped_storage(), offset, shape, stride), device)

    def _wrap(self, meta: Tensor, device: torch.device) -> FakeTensor:
        attributes = self._attributes.get(device)
        if attributes is None:
            attributes = self._attributes[device] = dict(vars(FakeTensor(self._mode, meta, device)))
        fake: Any = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_warn_deprecated_on_mutable_data_ptr(fake)  # type: ignore[attr-defined]
        vars(fake).update(attributes)
        return fake


def deny_primary_context() -> None:
    """Let CUDA's hooks answer that no device has a context; without a driver they raise, and autograd's engine asks
    them at every backward pass.

    The hooks are an object on the heap; it gets a copy of its table of virtual functions with one entry replaced.
    """
    hooks = ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    hooks.restype = ctypes.c_void_p
    table_pointer = ctypes.cast(hooks(), ctypes.POINTER(ctypes.c_void_p))
    kind = ctypes.c_void_p * 82  # with the two words before the first function; more than the interface has
    assert table_pointer[0] is not None
    table = kind(*ctypes.cast(table_pointer[0] - 16, ctypes.POINTER(kind)).contents)
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda _, __: False)
    table[2 + _HAS_PRIMARY_CONTEXT] = ctypes.cast(answer, ctypes.c_void_p).value
    _kept_for_cpp.extend((table, answer))
    table_pointer[0] = ctypes.addressof(table) + 16


def _apply_with_new_parameters(
    self: torch.nn.Module, fn: Callable[[Any], Any], recurse: bool = True
) -> torch.nn.Module:
    """`Module._apply` for fake tensors, whose storage cannot be exchanged: parameters are replaced by new ones with
    the old attributes, and shared ones stay shared."""
    changed: dict[int, tuple[Any, Any]] = {}  # the old one is kept, so that its id is not given again
    for module in self.modules() if recurse else [self]:
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in changed:
                with torch.no_grad():
                    value = fn(parameter)
                new = parameter
                if value is not parameter:
                    new = torch.nn.Parameter(value.detach(), parameter.requires_grad)
                    extra = {k: v for k, v in vars(parameter).items() if k not in vars(new) and k != "_shadow"}
                    vars(new).update(extra)
                changed[id(parameter)] = (new, parameter)
            module._parameters[name] = changed[id(parameter)][0]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self
