"""Scales and rounding of FP8, as the kernels compute them."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT32_MAX = torch.finfo(torch.float32).max


def scale_from_amax(
    amax: Tensor,
    limit: float,
    power_of_two: bool = False,
    epsilon: float = 0.0,
    value_for_infinity: float = FLOAT32_MAX,
) -> Tensor:
    """The factor that maps a largest magnitude to the end of the FP8 range; float32, in the shape of `amax`.

    limit / max(amax, epsilon), rounded to nearest; `power_of_two` clears its mantissa. An infinite quotient becomes
    `value_for_infinity`. The factor is 1 where amax is 0, infinite or NaN.

    Source: `compute_scale_from_amax` in common/recipe/recipe_common.cuh.
    """
    amax = amax.float()
    amax = torch.where(amax < epsilon, epsilon, amax)
    # Both are tensors: torch divides a number by a tensor as a product with the reciprocal, which is one bit off.
    scale = torch.full_like(amax, limit).div(amax)
    scale = torch.where(scale.isinf(), value_for_infinity, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)
    return torch.where(amax.isinf() | (amax == 0) | amax.isnan(), 1.0, scale)


def e8m0_exponent(amax: Tensor, code: torch.dtype) -> Tensor:
    """The biased exponent (int32, 0 to 255) of MXFP8's block scale: amax / largest value, rounded up to a power of two.

    Source: `float_to_e8m0` in common/util/ptx_arch_spec.cuh. An infinity saturates at 254; 255 is NaN.
    """
    value = amax.float() * (1.0 / torch.finfo(code).max)
    bits = value.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    rounds_up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = exponent + rounds_up
    exponent = torch.where(value.isinf(), 0xFE, exponent)
    return torch.where(value.isnan(), 0xFF, exponent)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) in float32 of a biased exponent; NaN of 255. Source: `exp2f` in common/util/ptx.cuh."""
    shift = exponent.to(torch.int32) - 127
    value = torch.ldexp(torch.ones_like(shift, dtype=torch.float32), shift)
    return torch.where(shift == 128, torch.nan, value)


def reciprocal_power_of_two(exponent: Tensor) -> Tensor:
    """2^(127 - exponent) in float32 of a biased exponent; NaN of 255. Source: `exp2f_rcp` in common/util/ptx.cuh."""
    shift = 127 - exponent.to(torch.int32)
    value = torch.ldexp(torch.ones_like(shift, dtype=torch.float32), shift)
    return torch.where(shift == -128, torch.nan, value)


def cast(x: Tensor, code: torch.dtype) -> Tensor:
    """Bytes of float32 `x` in FP8: nearest value, ties to even; beyond the range the largest value; NaN stays NaN.

    Source: the saturating conversions (`__NV_SATFINITE`) of common/util/ptx.cuh.
    """
    limit = torch.finfo(code).max
    return x.clamp(-limit, limit).to(code).view(torch.uint8)


def largest_magnitude(x: Tensor) -> Tensor:
    """The largest magnitude, a float32 scalar; 0 for an empty tensor."""
    return x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


def as_matrix(x: Tensor) -> Tensor:
    """[..., k] -> [n, k]."""
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)


def block_amax(x: Tensor, rows: int, columns: int) -> Tensor:
    """Largest magnitude of each block of a matrix, [⌈n / rows⌉, ⌈k / columns⌉]; the rest of ragged blocks is zero."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).abs().amax((1, 3))


def spread_blocks(values: Tensor, rows: int, columns: int, shape: tuple[int, int]) -> Tensor:
    """One value per block -> one per element of a matrix of `shape`; superfluous rows and columns are padding."""
    return values.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
