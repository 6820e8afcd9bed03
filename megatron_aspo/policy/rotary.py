"""Rotary embedding of packed streams without a loop over segments.

It replaces Megatron's unfused function, for multi-head latent attention on a GPU and for every model on a CPU.
"""

from __future__ import annotations

from typing import Any

import megatron.core.models.common.embeddings.rope_utils as mcore_rope
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from torch import Tensor

from megatron_aspo.policy.packing import forget_with_streams, once_per_stream, segment_positions


def install() -> None:
    """Replace Megatron's function, which copies the segments' lengths to the host twice per call, and free its tables
    of angles after a pass: lengths differ in almost every micro-batch. Idempotent."""
    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
        forget_with_streams(embedding.forward)
    setattr(mcore_rope, "_apply_rotary_pos_emb_thd", apply_rotary_thd)  # noqa: B010  (private name)


def apply_rotary_thd(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *, cp_group: Any, **options: Any) -> Tensor:
    """Rotate this rank's part [T / C, h, d] of a packed stream. No step waits for the device.

    Args:
        cu_seqlens: [n + 1], of the whole stream; every length is a multiple of 2 C where C > 1.
        freqs: [longest segment, 1, 1, d], angles by position.
    """
    place = (len(t), cp_group.rank(), cp_group.size())
    if not t.is_cuda and freqs.shape[-1] == t.shape[-1] and options in _PLAIN:
        cos, signed_sin = _rotation(cu_seqlens, freqs, *place)
        first, second = t.chunk(2, dim=-1)
        return t * cos.to(t.dtype) + torch.cat((second, first), dim=-1) * signed_sin.to(t.dtype)
    _, positions = segment_positions(cu_seqlens, *place)
    return mcore_rope._apply_rotary_pos_emb_bshd(t[:, None], freqs[positions], **options)[:, 0]


_PLAIN = ({}, {"rotary_interleaved": False, "mla_rotary_interleaved": False, "mscale": 1.0})
"""Options of halves that are not interleaved, unscaled."""


@once_per_stream
def _rotation(cu_seqlens: Tensor, freqs: Tensor, count: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """[count, 1, d]: the cosine, and the sine, negative in the first half, of each token's angles."""
    _, positions = segment_positions(cu_seqlens, count, rank, size)
    angles = freqs[positions][:, 0]
    sin = angles.sin()
    first, second = sin.chunk(2, dim=-1)
    return angles.cos(), torch.cat((-first, second), dim=-1)
