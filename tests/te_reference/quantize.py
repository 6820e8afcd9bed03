"""How values are rounded into quantized tensors, and the scales of delayed scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from te_reference.enums import torch_dtype
from te_reference.registry import kernel
from te_reference.rounding import (
    FLOAT32_MAX,
    as_matrix,
    block_amax,
    cast,
    e8m0_exponent,
    largest_magnitude,
    reciprocal_power_of_two,
    scale_from_amax,
    spread_blocks,
)
from te_reference.tensors import (
    BLOCK,
    MX_BLOCK,
    classes,
    convert_buffers,
    empty_quantized,
    is_delayed,
    turned_shape,
)

observers: list[Callable[[Tensor, Any, Any], None]] = []
"""Called with every quantized tensor: (x, quantizer, result)."""


def quantize_into(x: Tensor, quantizer: Any, out: Any) -> None:
    """Round `x` [..., k] into the buffers of `out`, each with the scales of its own direction.

    Source: `quantize` of the quantizers in csrc/quantizer.cpp, and the kernels in common/cast.
    """
    if x.numel() == 0:
        return
    c = classes()
    x = x.contiguous()
    if isinstance(quantizer, c.Delayed | c.Current):
        _quantize_tensor(x, quantizer, out)
    elif isinstance(quantizer, c.Block):
        _quantize_blocks(x, quantizer, out)
    else:
        _quantize_mxfp8(x, quantizer, out)
    for observe in observers:
        observe(x, quantizer, out)


def _quantize_tensor(x: Tensor, quantizer: Any, out: Any) -> None:
    """One scale for the tensor. Delayed scaling takes the quantizer's, and adds the largest magnitude to its amax;
    current scaling makes it from the largest magnitude, of all ranks of the reduction group if there is one."""
    if out._data is None:
        raise NotImplementedError("Columnwise-only per-tensor FP8 quantization is not implemented")
    code = torch_dtype(quantizer.dtype)
    amax = largest_magnitude(x).reshape(1)
    if is_delayed(quantizer):
        scale = quantizer.scale
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.view(quantizer.amax.shape)))
    else:
        if quantizer.with_amax_reduction:
            amax = amax.clone()
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer._canonicalized_amax_reduction_group())
        limit = torch.finfo(code).max
        scale = scale_from_amax(amax, limit, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    data = cast(x.float() * scale, code)
    out._data.copy_(data.view(out._data.shape))
    out._scale_inv.copy_(scale.reciprocal().view(out._scale_inv.shape))
    if out._transpose is not None:
        out._transpose.copy_(as_matrix(data).t().reshape(out._transpose.shape))
        out._transpose_invalid = False


def _quantize_blocks(x: Tensor, quantizer: Any, out: Any) -> None:
    """Blocks of 1 x 128 along the rows or the columns, or of 128 x 128. Scales along columns are stored transposed.

    Source: common/transpose/quantize_transpose_{vector,square}_blockwise; a block too small for a scale gets the
    largest value of the input's type.
    """
    code = torch_dtype(quantizer.dtype)
    square = quantizer.block_scaling_dim == 2
    height = BLOCK if square else 1
    rows = as_matrix(x).float()
    for data, scales, lines in (
        (out._rowwise_data, out._rowwise_scale_inv, rows),
        (out._columnwise_data, out._columnwise_scale_inv, rows.t().contiguous()),
    ):
        if data is None:
            continue
        scale = scale_from_amax(
            block_amax(lines, height, BLOCK),
            torch.finfo(code).max,
            quantizer.force_pow_2_scales,
            quantizer.amax_epsilon,
            torch.finfo(x.dtype).max,
        )
        shape = (lines.shape[0], lines.shape[1])
        data.copy_(cast(lines * spread_blocks(scale, height, BLOCK, shape), code).view(data.shape))
        inverse = scale.reciprocal()
        _put(scales, inverse if square else inverse.t())


def _quantize_mxfp8(x: Tensor, quantizer: Any, out: Any) -> None:
    """Blocks of 32 along the rows or the columns, with biased exponents as scales. Source: common/cast/mxfp8."""
    code = torch_dtype(quantizer.dtype)
    rows = as_matrix(x).float()
    for data, scales, is_columnwise in (
        (out._rowwise_data, out._rowwise_scale_inv, False),
        (out._columnwise_data, out._columnwise_scale_inv, True),
    ):
        if data is None:
            continue
        lines = rows.t() if is_columnwise else rows
        exponent = e8m0_exponent(block_amax(lines, 1, MX_BLOCK), code)
        coded = cast(lines * reciprocal_power_of_two(exponent).repeat_interleave(MX_BLOCK, 1), code)
        data.copy_((coded.t() if is_columnwise else coded).reshape(data.shape))
        _put(scales, (exponent.t() if is_columnwise else exponent).to(torch.uint8))


def _put(padded: Tensor, values: Tensor) -> None:
    """Write a matrix into the upper left of a larger one; the padding becomes 0."""
    padded.zero_()
    padded[: values.shape[0], : values.shape[1]] = values


@kernel
def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Quantize [..., k] into `output` or a new tensor; with `noop` set nothing is written. Source:
    csrc/extensions/cast.cpp."""
    if output is None:
        output = empty_quantized(quantizer, tensor.shape, tensor.dtype, tensor.device)
    else:
        convert_buffers(quantizer, output)
        if noop is not None and bool(noop.item()):
            return output
    quantize_into(tensor, quantizer, output)
    return output


@kernel
def split_quantize(
    tensor: Tensor, split_sections: Sequence[int], quantizer_list: Sequence[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    """Quantize the parts of [n, k], of n = Σ `split_sections` rows, each by its own quantizer. Source:
    csrc/extensions/cast.cpp."""
    parts = tensor.split(list(split_sections))
    return [quantize(x, quantizer) for x, quantizer in zip(parts, quantizer_list, strict=True)]


@kernel
def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: Any, pin_memory: bool = False
) -> Any:
    """A quantized tensor with uninitialised buffers. Source: csrc/extensions/allocate.cpp."""
    device = torch.device(device)
    return empty_quantized(quantizer, shape, dtype, "cpu" if device.type == "cuda" else device)


@kernel
def fp8_transpose(input: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """Bytes [..., k] -> [k, ...]. Source: csrc/extensions/transpose.cpp."""
    turned = as_matrix(input).t().contiguous().view(turned_shape(tuple(input.shape)))
    return turned if out is None else out.copy_(turned.view(out.shape))


@kernel
def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """[a, b, ...] -> [b, a, ...], contiguous. Source: csrc/extensions/transpose.cpp."""
    turned = tensor.transpose(0, 1).contiguous()
    return turned if out is None else out.copy_(turned.view(out.shape))


@kernel
def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: Tensor,
    amax_histories: Sequence[Tensor],
    scales: Sequence[Tensor],
    amax_compute_algo: str,
    fp8_dtype: Any,
    margin: float,
) -> None:
    """Scales of delayed scaling after a pass, for all its tensors.

    Args:
        amax_reduction_buffer: [Σ n], the largest magnitudes of the pass, over all ranks.
        amax_histories: [length, n] each; the first row collects the next pass. Rows move up by one, and the pass's
            magnitudes become the last.
        scales: [n] each: limit · 2^-margin / largest of the history, the old scale where that is 0, infinite or NaN.

    Source: common/recipe/delayed_scaling.cu and `_default_sf_compute` of Transformer Engine's Python.
    """
    limit = torch.finfo(torch_dtype(fp8_dtype)).max * 2.0**-margin
    parts = amax_reduction_buffer.split([scale.numel() for scale in scales])
    for last, history, scale in zip(parts, amax_histories, scales, strict=True):
        moved = torch.cat([history[1:], last[None]])
        amax = moved.amax(0) if amax_compute_algo == "max" else last
        history.copy_(moved)
        history[0].zero_()
        quotient = torch.full_like(amax, limit).div(amax).clamp(max=FLOAT32_MAX)
        scale.copy_(torch.where(amax.isfinite() & (amax > 0), quotient, scale))
