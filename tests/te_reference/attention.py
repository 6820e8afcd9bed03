"""cuDNN's fused attention: sequence by sequence, in float32, with the log-sum-exp that its backward pass needs."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from te_reference.enums import DType, FusedAttnBackend
from te_reference.registry import kernel


class _TorchWithFloat32AsHalf:
    """The module torch, for a check whether a type is `torch.float16` or `torch.bfloat16`."""

    float16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def allow_float32() -> None:
    """Let fused attention take float32, which cuDNN does not have: tests of its callers then have no rounding."""
    package = "transformer_engine.pytorch.attention.dot_product_attention"
    setattr(importlib.import_module(f"{package}.backends"), "torch", _TorchWithFloat32AsHalf())  # noqa: B010
    utils = importlib.import_module(f"{package}.utils")
    choose = utils.get_attention_backend
    as_half = functools.partial(dataclasses.replace, qkv_dtype=torch.bfloat16)
    setattr(utils, "get_attention_backend", lambda attention_params: choose(as_half(attention_params)))  # noqa: B010


@kernel
def get_cudnn_version() -> int:
    """9.20.0, the version that torch 2.13 brings. Source: `cudnnGetVersion`."""
    return 92000


@kernel
def get_fused_attn_backend(fused_attn_params: Any) -> tuple[Any, str]:
    """(backend, reason of a refusal): the kernels of 16-bit types. Source: csrc/extensions/attention.cpp."""
    for name in ("q_dtype", "qkv_dtype", "kv_dtype"):
        kind = getattr(fused_attn_params, name, None)
        if kind is not None and int(kind) not in (DType.kBFloat16, DType.kFloat16):
            return FusedAttnBackend.NVTE_No_Backend, "cuDNN has no attention in this type here"
    return FusedAttnBackend.NVTE_F16_arbitrary_seqlen, ""


def _format(layout: Any, which: int) -> str:
    """sbhd, bshd or thd, of the queries (0) or the keys (1) of a layout such as THD_THD_THD."""
    parts = layout.name.removeprefix("NVTE_").lower().replace("3", "").replace("2", "").split("_")
    return parts[min(which, len(parts) - 1)]


def _sequences(layout: str, cu: Tensor, padded: Tensor | None) -> list[Any]:
    """An index for each sequence's tokens; `padded` are the starts in a stream with gaps."""
    lengths = cu.diff().tolist()
    if layout == "thd":
        starts = (cu if padded is None else padded).tolist()
        return [slice(start, start + n) for start, n in zip(starts, lengths, strict=False)]
    if layout == "bshd":
        return [(i, slice(0, n)) for i, n in enumerate(lengths)]
    return [(slice(0, n), i) for i, n in enumerate(lengths)]


def _hidden(queries: int, keys: int, mask: str, window: tuple[int, int], bottom_right: bool) -> Tensor | None:
    """[queries, keys], True where a query does not see a key; None if every query sees every key."""
    shift = keys - queries if bottom_right or "BOTTOM_RIGHT" in mask else 0
    left, right = window
    if "CAUSAL" in mask:
        right = 0
    if left < 0 and right < 0:
        return None
    distance = torch.arange(keys)[None] - torch.arange(queries)[:, None] - shift
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    if right >= 0:
        hidden |= distance > right
    if left >= 0:
        hidden |= distance < -left
    return hidden


def _scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    """[queries, h, d], [keys, h, d] -> [h, queries, keys]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return scores if hidden is None else scores.masked_fill(hidden, -math.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse); a query that sees no key has lse = -∞ and no probabilities."""
    return torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])


def _pairs(layout: Any, cu_q: Tensor, cu_kv: Tensor, padded_q: Any, padded_kv: Any) -> Iterator[tuple[int, Any, Any]]:
    q = _sequences(_format(layout, 0), cu_q, padded_q)
    k = _sequences(_format(layout, 1), cu_kv, padded_kv)
    yield from ((i, *pair) for i, pair in enumerate(zip(q, k, strict=True)))


@kernel
def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: Any,
    o_format: Any,
    qkv_scale_inv_format: Any,
    bias_type: Any,
    attn_mask_type: Any,
    softmax_type: Any,
    window_size: Any,
    bottom_right_diagonal: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    fake_dtype: Any,
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    page_table_k: Any,
    page_table_v: Any,
    s_quantizer: Any,
    o_quantizer: Any,
    Bias: Any,
    SoftmaxOffset: Any,
    rng_gen: Any,
    rng_elts_per_thread: int,
    return_max_logit: bool,
    cuda_graph: bool,
) -> list[Any]:
    """Attention of Q [..., h, d] to K [..., g, d] and V [..., g, dv] in the layout of `qkv_layout`.

    Returns:
        [O [..., h, dv] in Q's type, log-sum-exp in float32, state of the random generator]. The log-sum-exp is
        [t, h, 1] of a stream and [b, h, s, 1] of a batch. Tokens outside all sequences are 0.

    Source: csrc/extensions/attention.cpp.
    """
    assert int(bias_type) == int(softmax_type) == 0
    assert page_table_k is None
    assert o_quantizer is None
    assert not return_max_logit
    assert not (p_dropout and is_training)
    layout = _format(qkv_layout, 0)
    assert o_format.name == f"NVTE_{layout.upper()}"
    out = torch.zeros(*Q.shape[:-1], V.shape[-1], dtype=Q.dtype)
    heads, group = Q.shape[-2], Q.shape[-2] // K.shape[-2]
    if layout == "thd":
        stats = torch.zeros(Q.shape[0], heads, 1)
    else:
        stats = torch.zeros(len(cu_seqlens_q) - 1, heads, Q.shape[1 if layout == "bshd" else 0], 1)
    for i, at_q, at_k in _pairs(qkv_layout, cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded):
        q = Q[at_q].float()
        k, v = (x[at_k].float().repeat_interleave(group, 1) for x in (K, V))
        if not len(q) or not len(k):
            continue
        hidden = _hidden(len(q), len(k), attn_mask_type.name, window_size, bottom_right_diagonal)
        scores = _scores(q, k, attn_scale, hidden)
        lse = scores.logsumexp(-1)  # [h, queries]
        out[at_q] = torch.einsum("hqk,khd->qhd", _probabilities(scores, lse), v).to(out.dtype)
        if layout == "thd":
            stats[at_q] = lse.t()[..., None]
        else:
            stats[i, :, : len(q), 0] = lse
    return [out, stats, torch.zeros(2, dtype=torch.int64)]


@kernel
def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: Any,
    o_format: Any,
    do_format: Any,
    dqkv_layout: Any,
    qkv_scale_inv_format: Any,
    do_scale_inv_format: Any,
    bias_type: Any,
    attn_mask_type: Any,
    softmax_type: Any,
    window_size: Any,
    bottom_right_diagonal: bool,
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    O: Tensor,  # noqa: E741
    dO: Tensor,
    fake_dtype: Any,
    Aux_CTX_Tensors: list[Any],
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    s_quantizer: Any,
    dp_quantizer: Any,
    dqkv_quantizer: Any,
    cuda_graph: bool,
) -> list[Any]:
    """The gradients [dQ, dK, dV, None, None] of `fused_attn_fwd`, each rounded once to the type of its tensor.

    Probabilities come from the log-sum-exp `Aux_CTX_Tensors[0]`, and Σ p dp from O and dO. Under context parallelism
    both are those of the whole sequence, so K and V may be a part of the keys.

    Source: csrc/extensions/attention.cpp.
    """
    dq, dk, dv = _gradients_like(Q, K, V, dqkv_layout)
    stats, group = Aux_CTX_Tensors[0], Q.shape[-2] // K.shape[-2]
    for i, at_q, at_k in _pairs(qkv_layout, cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded):
        q, o, do = (x[at_q].float() for x in (Q, O, dO))
        k, v = (x[at_k].float().repeat_interleave(group, 1) for x in (K, V))
        if not len(q) or not len(k):
            continue
        lse = stats[at_q][..., 0].t() if stats.dim() == 3 else stats[i, :, : len(q), 0]
        hidden = _hidden(len(q), len(k), attn_mask_type.name, window_size, bottom_right_diagonal)
        p = _probabilities(_scores(q, k, attn_scale, hidden), lse)
        dp = torch.einsum("qhd,khd->hqk", do, v)
        ds = p * (dp - (do * o).sum(-1).t()[..., None]) * attn_scale
        dq[at_q] = torch.einsum("hqk,khd->qhd", ds, k).to(dq.dtype)
        for out, value in ((dk, torch.einsum("hqk,qhd->khd", ds, q)), (dv, torch.einsum("hqk,qhd->khd", p, do))):
            out[at_k] = value.unflatten(1, (-1, group)).sum(2).to(out.dtype)
    return [dq, dk, dv, None, None]


def _gradients_like(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros like Q, K and V, views of one buffer where the layout interleaves them: Transformer Engine's Python takes
    the buffer."""
    name = layout.name.removeprefix("NVTE_").lower()
    if "3" in name:
        at = name.index("3") - len(name)  # 3hd: dimension -3; h3d: -2
        whole = torch.zeros(*q.shape[: at + 1], 3, *q.shape[at + 1 :], dtype=q.dtype)
        return whole.select(at, 0), whole.select(at, 1), whole.select(at, 2)
    if "2" in name:
        at = name.index("2") - len(name)
        whole = torch.zeros(*k.shape[: at + 1], 2, *k.shape[at + 1 :], dtype=k.dtype)
        return torch.zeros_like(q), whole.select(at, 0), whole.select(at, 1)
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
