"""The engine's attention over packed streams, and its parts under context parallelism (attention.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_aspo.tools.rehearsal.engine.enums import ENUMS
from megatron_aspo.tools.rehearsal.engine.registry import note, tex, tex_with_cost
from megatron_aspo.tools.rehearsal.shadows import UnknownValueError, real, shadow_of


@tex_with_cost
def get_fused_attn_backend(fused_attn_params: Any) -> tuple[Any, str]:
    return ENUMS["NVTE_Fused_Attn_Backend"].NVTE_F16_arbitrary_seqlen, ""


@tex_with_cost
def fused_attn_fwd(
    max_seqlen_q: int, max_seqlen_kv: int, is_training: bool, attn_scale: float, p_dropout: float, set_zero: bool,
    qkv_layout: Any, o_format: Any, qkv_scale_inv_format: Any, bias_type: Any, attn_mask_type: Any, softmax_type: Any,
    window_size: Any, bottom_right_diagonal: bool, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, Q: Tensor, K: Tensor,
    V: Tensor, *_: Any, **__: Any,
) -> list[Any]:  # fmt: skip
    """[O, log-sum-exp, state of the random generator] (attention.cpp)."""
    out = torch.empty((*Q.shape[:-1], V.shape[-1]), dtype=Q.dtype, device="cuda")
    if len(Q.shape) == 3:
        statistics = torch.empty(Q.shape[0], Q.shape[1], 1, device="cuda")
    else:
        statistics = torch.empty(len(cu_seqlens_q) - 1, Q.shape[2], max_seqlen_q, 1, device="cuda")
    products = _products(cu_seqlens_q, cu_seqlens_kv, attn_mask_type) * Q.shape[-2]
    note("attention", 2 * products * (Q.shape[-1] + V.shape[-1]), Q, K, V, out)
    return [out, statistics, torch.empty(2, dtype=torch.int64, device="cuda")]


@tex_with_cost
def fused_attn_bwd(
    max_seqlen_q: int, max_seqlen_kv: int, attn_scale: float, p_dropout: float, set_zero: bool, qkv_layout: Any,
    o_format: Any, do_format: Any, dqkv_layout: Any, qkv_scale_inv_format: Any, do_scale_inv_format: Any,
    bias_type: Any, attn_mask_type: Any, softmax_type: Any, window_size: Any, bottom_right_diagonal: bool,
    deterministic: bool, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, Q: Tensor, K: Tensor, V: Tensor,
    *_: Any, **__: Any,
) -> list[Any]:  # fmt: skip
    """[dQ, dK, dV, dBias, dSoftmaxOffset]; the kernel adds dQ up in a float32 buffer of its own."""
    buffer = torch.empty(Q.shape, dtype=torch.float32, device="cuda")
    gradients = _gradients_like(Q, K, V, dqkv_layout)
    del buffer
    products = _products(cu_seqlens_q, cu_seqlens_kv, attn_mask_type) * Q.shape[-2]
    note("attention", 5 * products * (Q.shape[-1] + V.shape[-1]), Q, K, V, *gradients)
    return [*gradients, None, None]


def _products(cu_q: Tensor, cu_k: Tensor, mask_type: Any) -> float:
    """Pairs of a query and a key that it sees, over all segments."""
    q, k = shadow_of(cu_q), shadow_of(cu_k)
    if q is None or k is None:
        raise UnknownValueError("the lengths of the segments are unknown to attention")
    with real():
        pairs = float((q.diff().double() * k.diff().double()).sum())
    return pairs / 2 if "CAUSAL" in mask_type.name else pairs


def _gradients_like(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> list[Tensor]:
    """Gradients that share a buffer where the layout interleaves them, since the engine takes views of it."""
    name = layout.name.removeprefix("NVTE_").lower()
    if "3" in name:
        at = name.index("3") - len(name)  # 3hd: -3; h3d: -2
        whole = q.new_empty((*q.shape[: at + 1], 3, *q.shape[at + 1 :]))
        return [whole.select(at, i) for i in range(3)]
    if "2" in name:
        at = name.index("2") - len(name)
        whole = k.new_empty((*k.shape[: at + 1], 2, *k.shape[at + 1 :]))
        return [q.new_empty(q.shape), whole.select(at, 0), whole.select(at, 1)]
    return [x.new_empty(x.shape) for x in (q, k, v)]


@tex
def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half_idx: int) -> Tensor:
    at = tensor.dim() - 3
    return tensor.new_empty((*tensor.shape[:at], tensor.shape[at] // 2, *tensor.shape[at + 1 :]))


@tex
def thd_read_second_half_lse(lse: Tensor, cu_seqlens: Tensor, lse_packed: bool, second_half_lse_seqlen: int) -> Tensor:
    return lse.new_empty((*lse.shape[:-1], second_half_lse_seqlen))


@tex
def thd_second_half_lse_correction(*args: Any) -> None: ...


@tex
def thd_out_correction(*args: Any) -> None: ...


@tex
def thd_grad_correction(*args: Any) -> None: ...
