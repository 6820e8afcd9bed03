"""The engine's matrix products, norms, rotary embeddings and optimizer steps (gemm.cpp, normalization.cpp, adam.cu)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_aspo.tools.rehearsal.engine.enums import torch_dtype
from megatron_aspo.tools.rehearsal.engine.quantize import make
from megatron_aspo.tools.rehearsal.engine.registry import functions, is_quantized, note, tex, tex_with_cost


@tex_with_cost
def generic_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, quantizer: Any, output_dtype: Any, bias: Any, bias_type: Any,
    gelu: bool, gelu_in: Any, grad: bool, *_: Any, **__: Any,
) -> list[Any]:  # fmt: skip
    """D = op(B) op(A) in row-major terms (gemm.cpp)."""
    a, b = tuple(A.size()), tuple(B.size())
    rows, columns = math.prod(a[:-1]), a[-1]
    n = rows if transA else columns
    shape = (b[-1], n) if transB else (*b[:-1], n)
    dtype = torch_dtype(output_dtype) if output_dtype is not None else getattr(A, "dtype", torch.bfloat16)
    if D is None:
        D = make(quantizer, shape, dtype)
    elif tuple(D.size()) != shape:
        raise RuntimeError(f"a product of {list(a)} and {list(b)} has {list(shape)}, and its output {list(D.size())}")
    bias_grad = torch.empty(b[-1], dtype=dtype, device="cuda") if bias is not None and grad else None
    in_fp8 = is_quantized(A)
    if in_fp8 != is_quantized(B):
        raise RuntimeError("a product of an FP8 operand and another one")
    for size in (a, b) if in_fp8 else ():
        if size[-1] % 16 or math.prod(size[:-1]) % 16:
            raise RuntimeError(f"cuBLAS takes no FP8 operand of {list(size)}: both sides must be multiples of 16")
    note("gemm_fp8" if in_fp8 else "gemm", 2.0 * math.prod(shape) * (columns if transA else rows), A, B, D)
    return [D, bias_grad, None, None]


@tex_with_cost
def te_general_grouped_gemm(
    A: Any, transa: bool, B: Any, transb: bool, D: Any, D_type: Any, m_splits: Any, bias: Any, bias_type: Any,
    single_output: bool, *_: Any, **__: Any,
) -> Any:  # fmt: skip
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        sizes, others = tuple(a.size()), tuple(b.size())
        rows, columns = math.prod(sizes[:-1]), sizes[-1]
        products = math.prod(others[:-1] if not transb else others[-1:]) * math.prod((rows, columns))
        out = D[0][: math.prod(others[:-1])] if single_output else D[i]
        note("gemm_fp8" if is_quantized(a) else "gemm", 2.0 * products, a, b, out)
    return bias


functions["get_num_cublas_streams"] = lambda: 4
functions["get_cublasLt_version"] = lambda: 130200
functions["get_cudnn_version"] = lambda: 92000
functions["device_supports_multicast"] = lambda device_id=-1: False
functions["get_stream_priority_range"] = lambda device_id=-1: (0, -1)
functions["ubuf_built_with_mpi"] = lambda: False
functions["nvte_built_with_cublasmp"] = lambda: False


@tex
def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> list[Any]:
    out = make(quantizer, input.shape, torch_dtype(otype)) if ln_out is None else ln_out
    return [out, None, torch.empty(math.prod(input.shape[:-1]), device="cuda")]


@tex
def rmsnorm_bwd(dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, *_: Any) -> list[Tensor]:
    return [torch.empty_like(x), torch.empty_like(gamma)]


@tex
def fused_rope_forward(input: Tensor, freqs: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@tex
def fused_rope_backward(output_grads: Tensor, freqs: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(output_grads, memory_format=torch.contiguous_format)


@tex
def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Any, scale: float) -> None: ...


@tex
def multi_tensor_scale_tensor(chunk_size: int, is_infinite: Tensor, tensor_lists: Any, scale: Tensor) -> None: ...


@tex
def multi_tensor_l2norm(chunk_size: int, noop_flag: Tensor, tensor_lists: Any, per_tensor: bool | None = False) -> Any:
    count = len(tensor_lists[0]) if per_tensor else 0
    return torch.empty(1, device="cuda"), torch.empty(count, device="cuda")


@tex
def multi_tensor_adam(*args: Any) -> None: ...


@tex
def multi_tensor_adam_param_remainder(*args: Any) -> None: ...


@tex
def multi_tensor_compute_scale_and_scale_inv(*args: Any) -> None: ...


@tex
def fp8_block_scaling_compute_partial_amax(*args: Any) -> None: ...


@tex
def fp8_block_scaling_partial_cast(*args: Any) -> None: ...
