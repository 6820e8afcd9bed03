"""Quantized tensors: which buffers they have, and how products read them."""

from __future__ import annotations

import functools
import importlib
import math
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from te_reference.enums import torch_dtype
from te_reference.registry import reads_any_layout
from te_reference.rounding import as_matrix, power_of_two, spread_blocks

BLOCK, MX_BLOCK = 128, 32
_PLAIN = (Tensor, torch.nn.Parameter)


@functools.cache
def classes() -> Any:
    """Transformer Engine's quantizers and storages; its tensors are storages too."""
    package = "transformer_engine.pytorch.tensor"
    block, float8, mxfp8, block_storage, float8_storage, mxfp8_storage = (
        importlib.import_module(f"{package}.{name}")
        for name in (
            "float8_blockwise_tensor",
            "float8_tensor",
            "mxfp8_tensor",
            "storage.float8_blockwise_tensor_storage",
            "storage.float8_tensor_storage",
            "storage.mxfp8_tensor_storage",
        )
    )
    return types.SimpleNamespace(
        Delayed=float8.Float8Quantizer,
        Current=float8.Float8CurrentScalingQuantizer,
        Block=block.Float8BlockQuantizer,
        MX=mxfp8.MXFP8Quantizer,
        Float8Tensor=float8.Float8Tensor,
        BlockTensor=block.Float8BlockwiseQTensor,
        MXTensor=mxfp8.MXFP8Tensor,
        Float8Storage=float8_storage.Float8TensorStorage,
        BlockStorage=block_storage.Float8BlockwiseQTensorStorage,
        MXStorage=mxfp8_storage.MXFP8TensorStorage,
    )


def is_delayed(quantizer: Any) -> bool:
    return quantizer is not None and isinstance(quantizer, classes().Delayed)


def is_fp8(x: Any) -> bool:
    if type(x) in _PLAIN:
        return False
    c = classes()
    return isinstance(x, c.Float8Storage | c.BlockStorage | c.MXStorage)


def empty_quantized(quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: Any = "cpu") -> Any:
    """A quantized tensor with the buffers that the quantizer wants; a plain tensor without a quantizer.

    Data are bytes. Per-tensor scaling has data [..., k] and, unless products read any layout, a transposed copy
    [k, ...]; scaling by blocks has rowwise data [..., k] and columnwise data, transposed for 128-wide blocks and not
    transposed for MXFP8, each with scales of the quantizer's own shape.

    Source: `create_tensor` in csrc/quantizer.cpp.
    """
    shape = tuple(int(n) for n in shape)
    if quantizer is None:
        return torch.empty(shape, dtype=dtype, device=device)
    c = classes()

    def empty(size: Sequence[int], kind: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(tuple(size), dtype=kind, device=device)

    arguments: dict[str, Any] = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if isinstance(quantizer, c.Delayed | c.Current):
        storage, tensor = c.Float8Storage, c.Float8Tensor
        has_data = quantizer.rowwise_usage or reads_any_layout()
        has_transpose = quantizer.columnwise_usage and not reads_any_layout()
        arguments |= {
            "data": empty(shape) if has_data else None,
            "data_transpose": empty(turned_shape(shape)) if has_transpose else None,
            "fp8_scale_inv": empty((1,), torch.float32),
        }
    elif isinstance(quantizer, c.Block | c.MX):
        storage, tensor, more = _block_arguments(quantizer, shape, empty)
        arguments |= more
    else:
        raise NotImplementedError(f"{type(quantizer).__name__} has no reference implementation")
    if quantizer.internal:
        return storage(**arguments, fake_dtype=dtype)
    return tensor(**arguments, shape=shape, dtype=dtype, device=device)


def _block_arguments(quantizer: Any, shape: tuple[int, ...], empty: Any) -> tuple[Any, Any, dict[str, Any]]:
    c = classes()
    is_mx = isinstance(quantizer, c.MX)
    if is_mx and (shape[-1] % MX_BLOCK or math.prod(shape[:-1]) % MX_BLOCK):
        raise ValueError(f"MXFP8 requires tensor dims that are divisible by {MX_BLOCK} (got shape={shape})")
    kind = torch.uint8 if is_mx else torch.float32
    arguments: dict[str, Any] = {}
    for name, columnwise, wanted in (
        ("rowwise", False, quantizer.rowwise_usage),
        ("columnwise", True, quantizer.columnwise_usage),
    ):
        size = turned_shape(shape) if columnwise and not is_mx else shape
        scales = quantizer.get_scale_shape(shape, columnwise=columnwise)
        arguments[f"{name}_data"] = empty(size) if wanted else None
        arguments[f"{name}_scale_inv"] = empty(scales, kind) if wanted else None
    if is_mx:
        return c.MXStorage, c.MXTensor, arguments | {"with_gemm_swizzled_scales": quantizer.optimize_for_gemm}
    return c.BlockStorage, c.BlockTensor, arguments | {"is_2D_scaled": quantizer.block_scaling_dim == 2}


def turned_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], *shape[:-1]) if shape else shape


def convert_buffers(quantizer: Any, out: Any) -> None:
    """Give an existing quantized tensor the buffers that the quantizer wants, and no others.

    Source: `convert_and_update_tensor` in csrc/quantizer.cpp.
    """
    c = classes()
    fresh = empty_quantized(quantizer, tuple(out.size()), torch.float32, "cpu")
    per_tensor = isinstance(quantizer, c.Delayed | c.Current)
    names = ["_data", "_transpose"]
    if not per_tensor:
        names = ["_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv"]
    for name in names:
        wanted, existing = getattr(fresh, name), getattr(out, name)
        if wanted is None or existing is None:
            setattr(out, name, wanted)
    out._fp8_dtype = quantizer.dtype
    if per_tensor:
        out._transpose_invalid = out._transpose is None
    if isinstance(quantizer, c.MX):
        out._with_gemm_swizzled_scales = quantizer.optimize_for_gemm


def operand(x: Any, columnwise: bool) -> Tensor:
    """The matrix [n, k] of a product's operand in float32, from the copy that the product reads on this GPU.

    Args:
        columnwise: whether the product sums over the rows.

    Raises:
        RuntimeError: the copy is absent.
    """
    if not is_fp8(x):
        return as_matrix(x).float()
    c = classes()
    code = torch_dtype(x._fp8_dtype)
    if isinstance(x, c.Float8Storage):
        if columnwise and not reads_any_layout():
            turned = _present(None if x._transpose_invalid else x._transpose, "a transposed copy")
            return turned.reshape(turned.shape[0], -1).t().contiguous().view(code).float() * x._scale_inv
        return as_matrix(_present(x._data, "rowwise data")).view(code).float() * x._scale_inv
    data, scales = (
        (x._columnwise_data, x._columnwise_scale_inv) if columnwise else (x._rowwise_data, x._rowwise_scale_inv)
    )
    data = _present(data, f"{'column' if columnwise else 'row'}wise data")
    if isinstance(x, c.BlockStorage):
        lines = data.reshape(data.shape[0], -1) if columnwise else as_matrix(data)
        height = BLOCK if x._is_2D_scaled else 1
        spread = spread_blocks(
            scales if x._is_2D_scaled else scales.t(), height, BLOCK, (lines.shape[0], lines.shape[1])
        )
        values = lines.view(code).float() * spread
        return values.t() if columnwise else values
    lines = as_matrix(data).view(code).float()
    height, width = (MX_BLOCK, 1) if columnwise else (1, MX_BLOCK)
    return lines * spread_blocks(power_of_two(scales), height, width, (lines.shape[0], lines.shape[1]))


def _present(data: Tensor | None, what: str) -> Tensor:
    if data is None:
        raise RuntimeError(f"the product needs {what}, which the operand does not have")
    return data
