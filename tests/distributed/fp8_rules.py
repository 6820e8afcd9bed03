"""Transformer Engine's published FP8 rules in numpy: scales from the bits of exponents, rounding by a search among the
sorted values of the format.

Nothing here is shared with `te_reference`. Source: the reference quantizers in Transformer Engine's own tests
(tests/pytorch/references), the OCP formats E4M3, E5M2 and E8M0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
Rule = Callable[[Array, Array], Array]

_MANTISSA, _EXPONENT = np.uint32(0x7FFFFF), np.uint32(0x7F800000)


def _values(exponent_bits: int) -> Array:
    """Finite non-negative values of a format; the index of a value is its code."""
    mantissa_bits, bias = 7 - exponent_bits, (1 << (exponent_bits - 1)) - 1
    found: list[float] = []
    for code in range(0x7F if exponent_bits == 4 else 0x7C):
        exponent, mantissa = divmod(code, 1 << mantissa_bits)
        found.append(math.ldexp(bool(exponent) + mantissa / (1 << mantissa_bits), max(exponent, 1) - bias))
    return np.array(found, np.float32)


E4M3, E5M2 = _values(4), _values(5)


def nearest(x: Array, format: Array) -> Array:
    """Round to the nearest value of the format, ties to the even code; larger values saturate."""
    size = np.minimum(np.abs(x), format[-1])
    above = np.searchsorted(format, size)  # the first value >= size
    below = np.maximum(above - 1, 0)
    # float64 makes the distances exact.
    to_above, to_below = format[above].astype(float) - size, size.astype(float) - format[below]
    is_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.copysign(np.where(is_above, format[above], format[below]), x).astype(np.float32)


def quotient(amax: Array, format: Array) -> Array:
    """The largest value of the format / amax; 1 where amax is 0 or infinite."""
    with np.errstate(divide="ignore", over="ignore"):
        scale = np.minimum(format[-1] / amax, np.finfo(np.float32).max)
    return np.where((amax == 0) | np.isinf(amax), np.float32(1), scale).astype(np.float32)


def power_of_two(amax: Array, format: Array) -> Array:
    """`quotient`, rounded down to a power of two."""
    return (quotient(amax, format).view(np.uint32) & _EXPONENT).view(np.float32)


def e8m0(amax: Array, format: Array) -> Array:
    """The reciprocal of amax / largest value, which is rounded up to a power of two with a biased exponent of 8
    bits."""
    bits = (amax * (np.float32(1) / format[-1])).astype(np.float32).view(np.uint32)
    exponent, mantissa = (bits >> 23).astype(int), bits & _MANTISSA
    rounds_up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = np.minimum(exponent + rounds_up, 0xFE)  # an infinite amax
    return np.ldexp(np.float32(1), 127 - exponent).astype(np.float32)


def scaled(x: Array, scale: Array, format: Array) -> Array:
    """Values of x · scale in the format, divided by the scale."""
    with np.errstate(over="ignore"):
        return (nearest(x * scale, format) * (np.float32(1) / scale)).astype(np.float32)


def round_blocks(x: Array, format: Array, rows: int, columns: int, rule: Rule) -> Array:
    """Round with a scale for each block of rows x columns; the last blocks may be smaller."""
    padded = np.pad(x, ((0, -x.shape[0] % rows), (0, -x.shape[1] % columns)))
    tiles = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scale = rule(np.abs(tiles).max((1, 3), keepdims=True), format)
    return scaled(tiles, scale, format).reshape(padded.shape)[: x.shape[0], : x.shape[1]]


def rounded(
    recipe: str, x: Tensor, format: Array, *, columnwise: bool, square: bool = False, scale: float | None = None
) -> Tensor:
    """The matrix x [n, k] as a recipe rounds it, in float32.

    Args:
        columnwise: for a product that sums over the rows: blocks lie along the columns.
        square: x is a weight, which "blockwise" rounds in blocks of 128 x 128.
        scale: that of "delayed".
    """
    values: Array = x.detach().float().numpy()
    if recipe == "delayed":
        return torch.from_numpy(scaled(values, np.full(1, scale, np.float32), format))
    if recipe == "current":
        return torch.from_numpy(round_blocks(values, format, x.shape[0], x.shape[1], quotient))
    length, rule = (128, power_of_two) if recipe == "blockwise" else (32, e8m0)
    height = 128 if recipe == "blockwise" and square else 1
    lines = np.ascontiguousarray(values.T) if columnwise else values
    result = round_blocks(lines, format, height, length, rule)
    return torch.from_numpy(np.ascontiguousarray(result.T if columnwise else result))
