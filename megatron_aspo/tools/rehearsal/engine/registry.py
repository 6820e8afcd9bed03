"""The stand-in for `transformer_engine_torch` 2.20 on fake tensors, and how its functions are registered.

Each function returns tensors of the shapes and types that its kernel fills, and tells the tape the kernel's cost. No
value is computed.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_aspo.tools.rehearsal.costs import bytes_touched
from megatron_aspo.tools.rehearsal.engine.enums import ENUMS
from megatron_aspo.tools.rehearsal.events import code_line
from megatron_aspo.tools.rehearsal.shadows import tensors_in

functions: dict[str, Any] = {}
"""Name in the extension -> function."""

state = types.SimpleNamespace(tape_now=lambda: None, transposes_in_gemm=False)
"""The current tape, and whether the GPU's FP8 products take operands of both layouts."""


def extension(tape_now: Callable[[], Any], capability: tuple[int, int]) -> types.ModuleType:
    """The module `transformer_engine_torch`, for a GPU of `capability`, whose kernels are told to `tape_now()`."""
    module = _Extension("transformer_engine_torch")
    state.tape_now = tape_now
    # nvte_is_non_tn_fp8_gemm_supported of common/transformer_engine.cpp
    state.transposes_in_gemm = (10, 0) <= capability < (12, 0) or capability >= (13, 0)
    for name, value in (functions | ENUMS).items():
        setattr(module, name, value)
    for name in ("CommOverlapHelper", "CommOverlap", "CommOverlapP2P", "CommOverlapCore", "FP8TensorMeta"):
        setattr(module, name, type(name, (), {}))
    for name in ("layernorm_fwd", "layernorm_bwd", "rmsnorm_bwd_add", "bgrad_quantize"):  # named by tables only
        setattr(module, name, getattr(module, name))
    module.grouped_mlp_experimental = types.SimpleNamespace()
    module.__all__ = [name for name in vars(module) if not name.startswith("__")]
    return module


class _Extension(types.ModuleType):
    __all__: list[str]
    grouped_mlp_experimental: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"transformer_engine_torch.{name} is not rehearsed")

        absent.__name__ = name
        return absent


def tex(function: Any) -> Any:
    """A function of the extension whose kernel moves its arguments and its result once."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_devices(function.__name__, (args, kwargs))
        with torch.no_grad():
            out = function(*args, **kwargs)
        if tape := state.tape_now():
            moved = sum(_bytes_of((args, tuple(kwargs.values()), out)))
            if moved:
                tape.kernel("elementwise", 0.0, moved)
        return out

    functions[function.__name__] = call
    return function


def tex_with_cost(function: Any) -> Any:
    """A function of the extension that tells the tape its own cost."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_devices(function.__name__, (args, kwargs))
        with torch.no_grad():
            return function(*args, **kwargs)

    functions[function.__name__] = call
    return function


def _check_devices(name: str, args: Any) -> None:
    """Raise RuntimeError for a tensor of the host, which a kernel on a GPU cannot read."""
    for tensor in tensors_in(args):
        if tensor.device.type == "cpu":
            raise RuntimeError(f"{name} gets a tensor {list(tensor.shape)} of the host, at {code_line()}")


def _bytes_of(value: Any) -> Iterable[int]:
    seen: dict[int, int] = {}
    tensor: Any
    for tensor in tensors_in(value):
        for part in tensor.get_data_tensors() if is_quantized(tensor) else (tensor,):
            if part is not None:
                seen[id(part)] = bytes_touched(part)
    return seen.values()


def is_quantized(tensor: Any) -> bool:
    """Whether it is one of the engine's FP8 tensors."""
    return hasattr(tensor, "get_data_tensors")


def note(kind: str, flops: float, *tensors: Any) -> None:
    if tape := state.tape_now():
        tape.kernel(kind, flops, sum(_bytes_of(tensors)))
