"""The functions that replace those of `transformer_engine_torch`, and the GPU that they pretend to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

KERNELS: dict[str, Callable[..., Any]] = {}
"""Name in `transformer_engine_torch` -> replacement."""

calls: Counter[str] = Counter()
"""Calls of each replacement by Transformer Engine."""

_capability = [(9, 0)]


def kernel[F: Callable[..., Any]](function: F) -> F:
    """Register a replacement under its own name."""
    KERNELS[function.__name__] = function
    return function


def capability() -> tuple[int, int]:
    """Compute capability of the pretended GPU: (9, 0), Hopper, unless `set_capability` changed it."""
    return _capability[0]


def set_capability(value: tuple[int, int]) -> None:
    """Choose the GPU, before Transformer Engine asks for it for the first time.

    Blockwise FP8 has its own products on (9, 0) and MXFP8 needs (10, 0).
    """
    _capability[0] = value


def reads_any_layout() -> bool:
    """Whether FP8 products read both operands in any layout, so that no transposed copies exist.

    Source: `nvte_is_non_tn_fp8_gemm_supported` in common/transformer_engine.cpp.
    """
    return (10, 0) <= capability() < (12, 0) or capability() >= (13, 0)
