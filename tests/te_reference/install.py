"""Transformer Engine's Python on the functions of this package, and a pretended GPU.

The order matters: `install`, imports of Megatron-Core, `megatron_aspo.policy.cpu.cuda.enable`, `pretend_gpu`.
Processes that build Megatron's local layers for comparison build them before `pretend_gpu`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import torch.distributed as dist

from megatron_aspo.tools.rehearsal.engine.load import EXTENSION, import_engine
from te_reference import attention, gemm, norms, optimizer, permutation, quantize, rope, thd
from te_reference.enums import ENUMS
from te_reference.registry import KERNELS, calls, capability

_MODULES = (attention, gemm, norms, optimizer, quantize, rope, thd)  # importing them fills KERNELS
_CLASSES = ("CommOverlapHelper", "CommOverlap", "CommOverlapP2P", "CommOverlapCore", "FP8TensorMeta")


def install() -> None:
    """Make `import transformer_engine.pytorch` work. Call it before Megatron-Core is imported.

    Raises:
        UserError: Transformer Engine's Python is not on the path.
        RuntimeError: it has been imported already.
    """
    if "transformer_engine" in sys.modules:
        raise RuntimeError("transformer_engine was imported before te_reference.install")
    extension = _Extension()
    import_engine(extension)
    exported = importlib.import_module("transformer_engine.pytorch.cpp_extensions")  # by `import *`
    setattr(exported, "__getattr__", extension.__getattr__)  # noqa: B010
    distributed = importlib.import_module("transformer_engine.pytorch.distributed")
    setattr(distributed, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())  # noqa: B010
    setattr(distributed, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))  # noqa: B010
    permutation.replace_in(importlib.import_module("transformer_engine.pytorch.triton.permutation"))
    ring = "transformer_engine.pytorch.attention.dot_product_attention.context_parallel"
    _wait_once(importlib.import_module(ring))
    real = dist.distributed_c10d._coalescing_manager
    setattr(dist, "_coalescing_manager", functools.partial(_one_by_one, real))  # noqa: B010


class _Extension(types.ModuleType):
    """The compiled module. A function without a replacement raises NotImplementedError when it is called."""

    def __init__(self) -> None:
        super().__init__(EXTENSION)
        self.__spec__ = ModuleSpec(EXTENSION, None)
        members = ENUMS | {name: _called(function) for name, function in KERNELS.items()}
        members |= {name: type(name, (), {}) for name in _CLASSES}
        members["grouped_mlp_experimental"] = types.SimpleNamespace()
        self.__dict__.update(members)
        self.__all__ = list(members)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{EXTENSION}.{name} has no reference implementation")

        return absent


def _called(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as compiled code behaves: outside autograd. Calls are counted."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[function.__name__] += 1
        with torch.no_grad():
            return function(*args, **kwargs)

    return call


class _Request:
    """A message of which one wait is passed on. Ring attention waits twice, and gloo would wait forever."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        self.work = None


def _wait_once(ring: Any) -> None:
    communicate = ring.flash_attn_p2p_communicate

    @functools.wraps(communicate)
    def call(*args: Any) -> list[_Request]:
        return [_Request(work) for work in communicate(*args)]

    ring.flash_attn_p2p_communicate = call


@contextlib.contextmanager
def _one_by_one(real: Any, group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
    """Gloo does not coalesce: collectives run one by one and are complete when the block ends."""
    if dist.get_backend(group) == "gloo":
        yield _Request(None)
    else:
        with real(group, device, async_ops) as manager:
            yield manager


def pretend_gpu() -> None:
    """Make Transformer Engine and Megatron-Core find a GPU with the capability of `registry`, whose tensors are the
    CPU's, and whose process groups use gloo. It cannot be undone."""
    properties = types.SimpleNamespace(
        name="reference",
        major=capability()[0],
        minor=capability()[1],
        multi_processor_count=132,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
        warp_size=32,
    )
    replacements: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 8,  # one for each rank of a test
        "get_device_capability": lambda device=None: capability(),
        "get_device_properties": lambda device=None: properties,
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (properties.total_memory, properties.total_memory),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *args: None)
    initialize = dist.init_process_group
    setattr(dist, "init_process_group", lambda *args, **kwargs: initialize(*args, **(kwargs | {"backend": "gloo"})))  # noqa: B010
    setattr(torch.Tensor, "is_cuda", property(_is_cuda))  # noqa: B010
    empty = torch.empty
    setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))  # noqa: B010
    _keep_modes_in_backward()


def _is_cuda(tensor: torch.Tensor) -> bool:
    """True for Transformer Engine, which asserts that tensors are on a GPU."""
    return sys._getframe(1).f_globals.get("__name__", "").startswith("transformer_engine")


def _keep_modes_in_backward() -> None:
    """torch suspends a mode while it handles `backward` itself, but layers are recomputed within it."""
    modes: list[Any] = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    run = torch.autograd._engine_run_backward

    @functools.wraps(run)
    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            if torch._C._len_torch_function_stack() == 0:
                for mode in modes:
                    stack.enter_context(mode)
            return run(*args, **kwargs)

    setattr(torch.autograd, "_engine_run_backward", run_backward)  # noqa: B010
