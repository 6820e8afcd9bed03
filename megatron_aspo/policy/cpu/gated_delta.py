"""Gated delta nets on a CPU: plain torch in place of the three kernels of flash-linear-attention that Megatron calls.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464, equation 10.
"""

from __future__ import annotations

from typing import Any

import megatron.core.ssm.gated_delta_net.common as mcore_common
import megatron.core.ssm.gated_delta_net.gdn as mcore_gdn
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aspo.policy.cpu.layers import segment_indices


def install() -> None:
    """Let Megatron's layer use these functions. Idempotent."""
    for module in (mcore_common, mcore_gdn):
        for function in (causal_conv1d, l2norm, chunk_gated_delta_rule):
            setattr(module, function.__name__, function)
    mcore_common.HAVE_FLA = True


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / ||x|| over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, cu_seqlens: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """SiLU of a convolution of every channel with the tokens before it: x [b, t, d], weight [d, width] -> [b, t, d]."""
    assert activation in ("silu", "swish"), activation
    rows, fold = _rows(cu_seqlens, x)
    padded = F.pad(rows[0].transpose(1, 2), (weight.shape[1] - 1, 0))
    convolved = F.conv1d(padded, weight[:, None], bias, groups=len(weight))
    return fold(F.silu(convolved).transpose(1, 2)), None


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The recurrence S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - k_t' exp(g_t) S_{t-1}), o_t = q_t' S_t / sqrt(d_k), in
    float32, token by token for all segments at once.

    Shapes: q, k [b, t, h, d_k], v [b, t, h, d_v], g, beta [b, t, h], initial_state [b, h, d_k, d_v] (0 if None) ->
    outputs [b, t, h, d_v] and the last state, which means nothing where segments are of unequal length.
    """
    (queries, keys, values, decays, rates), fold = _rows(cu_seqlens, *(x.float() for x in (q, k, v, g, beta)))
    queries, decays = queries / k.shape[-1] ** 0.5, decays.exp()
    state = keys.new_zeros(len(keys), *keys.shape[2:], v.shape[-1]) if initial_state is None else initial_state.float()
    outputs: list[Tensor] = []
    for t in range(keys.shape[1]):
        state = state * decays[:, t, :, None, None]
        known = torch.einsum("shkv,shk->shv", state, keys[:, t])
        change = (values[:, t] - known) * rates[:, t, :, None]
        state = state + torch.einsum("shk,shv->shkv", keys[:, t], change)
        outputs.append(torch.einsum("shkv,shk->shv", state, queries[:, t]))
    return fold(torch.stack(outputs, 1)).to(v.dtype), state


def _rows(cu_seqlens: Tensor | None, *streams: Tensor) -> tuple[list[Tensor], Any]:
    """Streams [1, T, ...] as [segments, longest, ...], and a function back; batches as they are."""
    if cu_seqlens is None:
        return list(streams), lambda rows: rows
    # Slots past a segment's end repeat the stream's first token; no earlier token depends on them.
    unfold, fold = segment_indices(cu_seqlens, int(cu_seqlens.diff().max()))
    return [x[0][unfold] for x in streams], lambda rows: rows.flatten(0, 1)[fold][None]
