"""Rotary embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_reference.registry import kernel


def _positions(t: Tensor, layout: str, cu_seqlens: Tensor | None, cp_size: int, cp_rank: int) -> Tensor:
    """Positions of this rank's tokens: [t] of a packed stream, else [s].

    Under context parallelism a sequence has 2 C chunks; the rank holds chunk `cp_rank` and chunk 2 C - 1 - `cp_rank`.
    """
    if layout == "THD":
        assert cu_seqlens is not None
        lengths = (cu_seqlens // cp_size).diff().tolist()
    else:
        lengths = [t.shape[0 if layout == "SBHD" else 1]]
    parts = []
    for n in lengths:
        within = torch.arange(n)
        if cp_size > 1:
            assert n % 2 == 0, "under context parallelism a rank has two chunks of each sequence"
            last = n * cp_size - (cp_rank + 1) * n // 2 - n // 2
            within = within + torch.where(within < n // 2, cp_rank * n // 2, last)
        parts.append(within)
    return torch.cat(parts)


def _rotate(
    t: Tensor, freqs: Tensor, layout: Any, interleaved: bool, cu_seqlens: Any, cp_size: int, cp_rank: int, sign: int
) -> Tensor:
    name = layout.name.removeprefix("NVTE_")
    assert not interleaved, "only halves are rotated"
    positions = _positions(t, name, cu_seqlens, cp_size, cp_rank)
    angles = freqs[positions, 0, 0]  # [tokens, d2]
    shape = {"THD": (-1, 1), "SBHD": (-1, 1, 1), "BSHD": (1, -1, 1)}[name]
    angles = angles.reshape(*shape, angles.shape[-1])
    width = angles.shape[-1]
    x = t[..., :width].float()
    first, second = x.chunk(2, -1)
    if sign > 0:
        rotated = x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
    else:  # the transpose: each half takes the other half's angles
        sine = torch.cat(angles.sin().chunk(2, -1)[::-1], -1)
        rotated = x * angles.cos() + torch.cat([second * sine[..., : width // 2], -first * sine[..., width // 2 :]], -1)
    return torch.cat([rotated.to(t.dtype), t[..., width:]], -1)


@kernel
def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Rotate the first d2 of [t, h, d], [s, b, h, d] or [b, s, h, d], in float32, rounded once.

    Args:
        freqs: [longest sequence, 1, 1, d2], angles by position, float32.
        cu_seqlens: [n + 1], of the whole stream; used with THD only.

    Source: csrc/extensions/apply_rope.cpp, common/fused_rope/fused_rope.cu.
    """
    assert start_positions is None
    return _rotate(input, freqs, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, 1)


@kernel
def fused_rope_backward(
    output_grads: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """The gradient of `fused_rope_forward`'s input. Source: the same."""
    assert start_positions is None
    return _rotate(output_grads, freqs, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, -1)
