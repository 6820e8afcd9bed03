"""Stand-in for CUDA: lets Megatron-Core run over gloo on a host without a GPU.

Megatron-Core assumes CUDA in several places. Each gets a replacement here:

- factory calls with `device="cuda"`, and `Tensor.type()` compared with "torch.cuda.FloatTensor": a TorchFunctionMode
  rewrites both;
- functions of `torch.cuda` (streams, events, RNG state, synchronisation): versions for one synchronous device;
- its RNG tracker, which calls CUDA's generators: the CPU generator;
- its dispatcher of tokens to experts, which makes lists of split sizes while it fetches them from the GPU, and gathers
  unequal parts from tensor-parallel ranks, which gloo cannot do: lists made in place, and an all-reduce;
- its small functions, decorated with torch.compile: imported without it.

Nothing happens if CUDA is available. `cpu.layers` has the layers that a CPU needs besides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

_active: list[TorchFunctionMode] = []


def import_megatron() -> None:
    """Import Megatron-Core, without CUDA with its small functions uncompiled.

    As their decorator, torch.compile imports torch's compiler, which takes a third of all imports' time. Modules that
    have been imported before stay as they are.
    """
    if torch.cuda.is_available():
        import megatron.core  # noqa: F401

        return

    def uncompiled(model: Any = None, **options: Any) -> Any:
        return uncompiled if model is None else model

    compiled, torch.compile = torch.compile, uncompiled
    try:
        from megatron.core.jit import disable_jit_fuser
    finally:
        torch.compile = compiled
    disable_jit_fuser()  # in modules of Megatron that are imported later


def enable() -> bool:
    """Make Megatron-Core run on the CPU if there is no CUDA. Idempotent; returns whether the CPU is used."""
    if torch.cuda.is_available():
        return False
    if not _active:
        _replace_cuda_functions()
        mode = _CudaMeansCpu()
        mode.__enter__()
        _active.append(mode)
    return True


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Leave devices as they are, for code that is not Megatron's and supports CPUs."""
    for mode in reversed(_active):
        mode.__exit__(None, None, None)
    try:
        yield
    finally:
        for mode in _active:
            mode.__enter__()


class _CudaMeansCpu(TorchFunctionMode):
    """Sends tensors meant for "cuda" to the CPU; CPU tensors pass Megatron's checks of type names."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        elif func is torch.Tensor.to and any(_is_cuda(a) for a in args[1:]):
            args = (args[0], *("cpu" if _is_cuda(a) else a for a in args[1:]))
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return "torch.cuda." + func(*args).removeprefix("torch.")
        return func(*args, **(kwargs or {}))


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _SynchronousStream:
    """A CUDA stream or event on a device where every call is complete when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> _SynchronousStream:
        return self

    def query(self) -> bool:
        return True


def _replace_cuda_functions() -> None:
    import megatron.core.tensor_parallel.mappings as mcore_mappings
    import megatron.core.tensor_parallel.random as mcore_random
    import megatron.core.transformer.moe.token_dispatcher as mcore_dispatcher

    def get_rng_state(*args: Any, **kwargs: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    replacements: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "current_stream": _SynchronousStream,
        "default_stream": _SynchronousStream,
        "Stream": _SynchronousStream,
        "Event": _SynchronousStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "manual_seed": torch.manual_seed,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    setattr(mcore_random, "_get_cuda_rng_state", get_rng_state)  # noqa: B010  (private names of another library)
    setattr(mcore_random, "_set_cuda_rng_state", set_rng_state)  # noqa: B010
    mcore_dispatcher.maybe_move_tensor_to_cpu = _as_on_cpu
    for name, uneven in (("_gather_along_first_dim", _gather), ("_reduce_scatter_along_first_dim", _reduce_scatter)):
        setattr(mcore_mappings, name, partial(uneven, getattr(mcore_mappings, name)))


def _as_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _gather(even: Any, x: Tensor, group: Any, sizes: list[int] | None = None, *buffer: Any, **options: Any) -> Tensor:
    """Megatron's gather along the first dimension; the part of rank r has length sizes[r]."""
    if sizes is None or group.size() == 1:
        return even(x, group, sizes, *buffer, **options)
    whole = x.new_zeros(sum(sizes), *x.shape[1:])
    whole.split(sizes)[group.rank()].copy_(x)
    dist.all_reduce(whole, group=group)
    return whole


def _reduce_scatter(
    even: Any, x: Tensor, group: Any, sizes: list[int] | None = None, *buffer: Any, **options: Any
) -> Tensor:
    """Megatron's reduce-scatter along the first dimension; the part of rank r has length sizes[r]."""
    if sizes is None or group.size() == 1:
        return even(x, group, sizes, *buffer, **options)
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()]
