"""The engine's quantized tensors: buffers as quantizer.cpp makes them, without values."""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch
from torch import Tensor

from megatron_aspo.tools.rehearsal.engine.enums import torch_dtype
from megatron_aspo.tools.rehearsal.engine.registry import functions, state, tex


def make(quantizer: Any, shape: Any, dtype: torch.dtype, device: Any = "cuda") -> Any:
    """A tensor with the buffers that the quantizer wants (quantizer.cpp, create_tensor)."""
    shape = tuple(int(size) for size in shape)
    if quantizer is None:
        return torch.empty(shape, dtype=dtype, device=device)
    rows, columns = quantizer.rowwise_usage, quantizer.columnwise_usage

    def empty(size: Any, kind: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(tuple(size), dtype=kind, device=device)

    turned = (shape[-1], *shape[:-1])
    name = type(quantizer).__name__
    args: dict[str, Any] = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if name in ("Float8Quantizer", "Float8CurrentScalingQuantizer"):
        by_gemm = state.transposes_in_gemm
        args |= {
            "data": empty(shape) if rows or by_gemm else None,
            "data_transpose": empty(turned) if columns and not by_gemm else None,
            "fp8_scale_inv": empty((1,), torch.float32),
        }
    elif name in ("Float8BlockQuantizer", "MXFP8Quantizer"):
        is_block = name == "Float8BlockQuantizer"
        if not is_block and (shape[-1] % 32 or math.prod(shape[:-1]) % 32):
            raise ValueError(f"MXFP8 takes tensors whose sides are multiples of 32, not {list(shape)}")
        kind = torch.float32 if is_block else torch.uint8
        args |= {
            "rowwise_data": empty(shape) if rows else None,
            "rowwise_scale_inv": empty(quantizer.get_scale_shape(shape, columnwise=False), kind) if rows else None,
            "columnwise_data": empty(turned if is_block else shape) if columns else None,
            "columnwise_scale_inv": empty(quantizer.get_scale_shape(shape, columnwise=True), kind) if columns else None,
        }
        if is_block:
            args["is_2D_scaled"] = quantizer.block_scaling_dim == 2
        else:
            args["with_gemm_swizzled_scales"] = quantizer.optimize_for_gemm
    else:
        raise NotImplementedError(f"{name} is not rehearsed")
    tensor, storage = _classes()[name]
    if quantizer.internal:
        return storage(**args, fake_dtype=dtype)
    return tensor(**args, shape=shape, dtype=dtype, device=device)


@functools.cache
def _classes() -> dict[str, tuple[Any, Any]]:
    """Quantizer -> its class of tensors and the lighter one of those that only the engine sees."""

    def both(module: str, name: str) -> tuple[Any, Any]:
        place = "transformer_engine.pytorch.tensor"
        tensor = getattr(importlib.import_module(f"{place}.{module}"), name)
        return tensor, getattr(importlib.import_module(f"{place}.storage.{module}_storage"), f"{name}Storage")

    float8 = both("float8_tensor", "Float8Tensor")
    return {
        "Float8Quantizer": float8,
        "Float8CurrentScalingQuantizer": float8,
        "Float8BlockQuantizer": both("float8_blockwise_tensor", "Float8BlockwiseQTensor"),
        "MXFP8Quantizer": both("mxfp8_tensor", "MXFP8Tensor"),
    }


def _fill_buffers(quantizer: Any, out: Any) -> None:
    """Give `out` the buffers that the quantizer wants, and no others (quantizer.cpp, convert_and_update_tensor)."""
    fresh = make(quantizer, tuple(out.size()), torch.bfloat16)
    if hasattr(out, "_data"):
        names = ("_data", "_transpose")
    else:
        names = ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv")
    for name in names:
        if getattr(fresh, name) is None or getattr(out, name) is None:
            setattr(out, name, getattr(fresh, name))
    if names[0] == "_data":
        out._transpose_invalid = out._transpose is None


@tex
def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    if output is None:
        output = make(quantizer, tensor.shape, tensor.dtype, tensor.device)
    else:
        _fill_buffers(quantizer, output)
    reduce = getattr(quantizer, "with_amax_reduction", False)
    if reduce:
        torch.distributed.all_reduce(
            torch.empty(1, device="cuda"),
            op=torch.distributed.ReduceOp.MAX,
            group=quantizer._canonicalized_amax_reduction_group(),
        )
    return output


@tex
def dequantize(input: Any, otype: Any) -> Tensor:
    return torch.empty(tuple(input.size()), dtype=torch_dtype(otype), device="cuda")


@tex
def create_empty_quantized_tensor(
    quantizer: Any, shape: Any, dtype: torch.dtype, device: Any, pin_memory: bool = False
) -> Any:
    return make(quantizer, shape, dtype, device)


@tex
def multi_tensor_quantize(tensor_list: Any, quantizer_list: Any) -> list[Any]:
    return [quantize(x, quantizer) for x, quantizer in zip(tensor_list, quantizer_list, strict=True)]


@tex
def split_quantize(
    tensor: Tensor, split_sections: Any, quantizer_list: Any, disable_bulk_allocation: bool = False
) -> list[Any]:
    parts = tensor[: sum(split_sections)].split(list(split_sections))
    return [quantize(part, quantizer) for part, quantizer in zip(parts, quantizer_list, strict=True)]


@tex
def fp8_transpose(input: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    return input.new_empty((input.shape[-1], *input.shape[:-1])) if out is None else out


@tex
def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    return tensor.new_empty((tensor.shape[1], tensor.shape[0], *tensor.shape[2:])) if out is None else out


@tex
def compute_amax(input: Tensor, amax: Tensor) -> None: ...


@tex
def fused_amax_and_scale_update_after_reduction(*args: Any) -> None: ...


@tex
def swizzle_scales_for_gemm_(*args: Any, **kwargs: Any) -> None: ...


functions["multi_tensor_swizzle_scales_for_gemm_"] = swizzle_scales_for_gemm_
functions["multi_tensor_swizzle_scales_for_gemm_unchecked_"] = swizzle_scales_for_gemm_
