"""Gated delta nets: the three functions of flash-linear-attention that Megatron-Core calls, with the tensors that their
kernels keep for the backward pass and work in (fla.modules.convolution, fla.modules.l2norm, fla.ops.gated_delta_rule).
"""

from __future__ import annotations

from typing import Any

import megatron.core.ssm.gated_delta_net.common as mcore_common
import megatron.core.ssm.gated_delta_net.gdn as mcore_gdn
import torch
from torch import Tensor
from torch.autograd import Function

from megatron_aspo.tools.rehearsal.engine.registry import note

CHUNK = 64
"""Tokens of a segment that share a state."""


def install() -> None:
    """Replace the functions in Megatron-Core's modules."""
    for module in (mcore_common, mcore_gdn):
        for function in (causal_conv1d, l2norm, chunk_gated_delta_rule):
            setattr(module, function.__name__, function)
    mcore_common.HAVE_FLA = True


def l2norm(x: Tensor) -> Tensor:
    return _Norm.apply(x)  # type: ignore[return-value]


def causal_conv1d(x: Tensor, weight: Tensor, cu_seqlens: Tensor, **_: Any) -> tuple[Tensor, None]:
    return _Convolution.apply(x, weight, _chunks(x, cu_seqlens)), None  # type: ignore[return-value]


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, **_: Any
) -> tuple[Tensor, None]:
    return _DeltaRule.apply(q, k, v, g, beta, _chunks(q, cu_seqlens)), None  # type: ignore[return-value]


def _chunks(x: Tensor, cu_seqlens: Tensor) -> int:
    """Most chunks that the segments can have; the last one of each may be short."""
    return x.shape[1] // CHUNK + len(cu_seqlens) - 1


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(x)
        ctx.save_for_backward(out, x.new_empty(x.shape[:-1], dtype=torch.float32))
        note("elementwise", 0.0, x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        out, _ = ctx.saved_tensors
        dx = torch.empty_like(out)
        note("elementwise", 0.0, out, grad, dx)
        return dx


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, chunks: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.chunks = chunks
        out = x.new_empty(x.shape)
        note("elementwise", 0.0, x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        before, dx = (x.new_empty(x.shape) for _ in range(2))  # the activation's argument is computed again
        parts = weight.new_empty(ctx.chunks, *weight.shape, dtype=torch.float32)
        note("elementwise", 0.0, x, before)
        note("elementwise", 0.0, x, grad, before, dx, parts)
        return dx, torch.empty_like(weight), None


class _DeltaRule(Function):
    """Products by chunks of C tokens with heads of d_k, d_v: per token and head 3 d_k d_v + C (3 d_k + 2 d_v) forward,
    8 d_k d_v + C (8 d_k + 5 d_v) backward, which computes the states again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunks: int
    ) -> Tensor:
        decays, out = torch.empty_like(g, dtype=torch.float32), torch.empty_like(v)
        kept, whole = (q.new_empty(*q.shape[:-1], CHUNK, dtype=dtype) for dtype in (q.dtype, torch.float32))
        work = [whole, torch.empty_like(k), *(torch.empty_like(v) for _ in range(2)), _states(k, v, chunks)]
        ctx.save_for_backward(q, k, v, decays, beta, kept)
        ctx.chunks = chunks
        d_k, d_v = k.shape[-1], v.shape[-1]
        products = 3 * d_k * d_v + CHUNK * (3 * d_k + 2 * d_v)
        note("attention", 2.0 * g.numel() * products, q, k, v, g, beta, decays, kept, *work)  # in several kernels
        note("elementwise", 0.0, *work, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, decays, beta, _ = ctx.saved_tensors
        like_keys, like_values = ([torch.empty_like(x) for _ in range(3)] for x in (k, v))
        work = [*like_keys, *like_values, *(_states(k, v, ctx.chunks) for _ in range(2))]
        gradients = [torch.empty_like(x) for x in (q, k, v, decays, beta)]
        d_k, d_v = k.shape[-1], v.shape[-1]
        products = 8 * d_k * d_v + CHUNK * (8 * d_k + 5 * d_v)
        note("attention", 2.0 * beta.numel() * products, grad, *ctx.saved_tensors, *work)
        note("elementwise", 0.0, *work, *gradients)
        return *gradients, None


def _states(k: Tensor, v: Tensor, chunks: int) -> Tensor:
    """A state for each chunk and head."""
    return k.new_empty(k.shape[0], chunks, k.shape[2], k.shape[-1], v.shape[-1])
