"""Matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from te_reference.enums import torch_dtype
from te_reference.quantize import quantize_into
from te_reference.registry import kernel
from te_reference.rounding import as_matrix
from te_reference.tensors import empty_quantized, is_fp8, operand


def _check_operands(a: Any, b: Any) -> None:
    """Raise RuntimeError for operands that cuBLAS refuses: FP8 with another type; FP8 rows that are no multiple of 16
    bytes."""
    if is_fp8(a) != is_fp8(b):
        raise RuntimeError("a product of an FP8 and another operand")
    for x in (a, b) if is_fp8(a) else ():
        shape = tuple(x.size())
        if shape[-1] % 16 or math.prod(shape[:-1]) % 8:
            raise RuntimeError(f"cuBLAS takes no FP8 product of a {shape} operand")


@kernel
def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Any,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """D = α op(B) op(A) (+ β D) in row-major terms: [..., k] [m, k]ᵀ -> [..., m] with `transA`, [..., m] [m, k] ->
    [..., k] without, [n, m]ᵀ [n, k] -> [m, k] with `transB`.

    FP8 operands are read from the copy along whose rows the product sums. The sum is in float32 and is rounded once,
    to `output_dtype` or the type of D.

    Args:
        bias: [m], added to the product; with `grad` the gradient of a bias is returned, the sum of B's rows.

    Returns:
        [D, bias gradient, None, None].

    Source: `gemm` in csrc/extensions/gemm.cpp.
    """
    if comm_overlap is not None or gelu:
        raise NotImplementedError("products that overlap communication or apply GELU")
    a_shape, b_shape = tuple(A.size()), tuple(B.size())
    rows = (b_shape[-1],) if transB else b_shape[:-1]
    out_shape = (*rows, math.prod(a_shape[:-1]) if transA else a_shape[-1])
    kind = A.dtype if isinstance(A, Tensor) else A._dtype
    if output_dtype is not None:
        kind = torch_dtype(output_dtype)
    if D is not None:
        assert tuple(D.shape) == out_shape, f"GEMM output has invalid dims (expected {out_shape}, got {D.shape})"
        assert output_dtype is None or D.dtype == kind, "GEMM output has invalid dtype"
        kind = D.dtype
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = operand(B, columnwise=transB).sum(0).to(kind)
    if math.prod(a_shape) and math.prod(b_shape):
        _check_operands(A, B)
        left, right = operand(B, columnwise=transB), operand(A, columnwise=not transA)
        out = alpha * ((left.t() if transB else left) @ (right.t() if transA else right))
        if bias is not None and not grad:
            out = out + bias.float()
        if accumulate:
            assert D is not None
            out = out + (1.0 if beta is None else beta) * as_matrix(D).float()
        out = out.to(kind).reshape(out_shape)
    else:
        out = D if D is not None and accumulate else torch.zeros(out_shape, dtype=kind)
    if quantizer is not None:
        D = empty_quantized(quantizer, out_shape, kind)
        quantize_into(out, quantizer, D)
        return [D, bias_gradient, None, None]
    return [out if D is None else D.copy_(out), bias_gradient, None, None]


@kernel
def te_general_grouped_gemm(
    A: Sequence[Any],
    transa: bool,
    B: Sequence[Any],
    transb: bool,
    D: Sequence[Tensor],
    D_type: Any,
    m_splits: Any,
    bias: Sequence[Tensor | None],
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int = 0,
) -> Any:
    """The products of experts, each as in `generic_gemm`.

    Args:
        D: an output per expert, or with `single_output` one [Σ n, m] for all, with each expert's rows in order.
        bias: a tensor per expert; empty ones are absent. With `grad` gradients are written into them.

    Source: csrc/extensions/gemm.cpp.
    """
    outputs = D
    if single_output:
        rows = [b.size(-1) if transb else math.prod(tuple(b.size())[:-1]) for b in B]
        outputs = as_matrix(D[0]).split(rows)
    for a, b, out, b_bias in zip(A, B, outputs, bias, strict=True):
        has_bias = b_bias is not None and b_bias.numel() > 0
        _, gradient, _, _ = generic_gemm(
            a, transa, b, transb, out, None, None, b_bias if has_bias else None, bias_type, False, None, grad,
            None, 0, accumulate, use_split_accumulator,
        )  # fmt: skip
        if gradient is not None and b_bias is not None:
            b_bias.copy_(gradient)
    return bias


@kernel
def get_num_cublas_streams() -> int:
    """Streams among which experts' products are spread. Source: common/util/multi_stream.cpp."""
    return 4
