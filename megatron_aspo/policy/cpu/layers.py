"""Layers for a CPU: a norm for sequence parallelism, attention over packed streams, and the experts of a rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aspo.policy.packing import once_per_stream, stream_part


def build_experts(builder: Any, num_local_experts: int, config: Any, *, pg_collection: Any, **options: Any) -> Any:
    """This rank's part of a layer's experts, drawn as if it held them all.

    On a CPU all ranks draw weights from the same generator. If each drew only its own experts, all ranks would hold the
    same ones, and all later weights would depend on the layout.
    """
    experts = builder(num_local_experts * pg_collection.ep.size(), config, pg_collection=pg_collection, **options)
    first = pg_collection.ep.rank() * num_local_experts
    experts.local_experts = experts.local_experts[first : first + num_local_experts]
    experts.num_local_experts = num_local_experts
    return experts


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor, usable with sequence parallelism, of weights around 1 or around 0.

    Under sequence parallelism each rank sees only its share of the positions, so the weight's gradient must be summed
    over the tensor-parallel group. Megatron does this for parameters that carry the attribute.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self.around_zero = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight + 1 if self.around_zero else self.weight, self.eps)


class PackedAttention(torch.nn.Module):
    """Causal attention over packed streams (THD) and over batches (SBHD), in plain torch.

    A stream is unfolded to [segments, heads, longest segment, dim]: work grows with the square of the segments' length,
    not of the stream's, and no [T, T] mask exists. Under context parallelism every rank gathers the keys and values of
    the whole stream; batches are never split.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        assert config.attention_dropout == 0, "PackedAttention has no dropout"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """[T, h, d] with `packed_seq_params`, else [s, b, h, d] -> [T, h d] or [s, b, h d]; under context
        parallelism T is this rank's part of the stream.

        In a batch the last query is at the position of the last key, as with a key-value cache.
        """
        assert attention_mask is None, "the mask is given by cu_seqlens, or causal"
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = _causal_attention(q, k, v, self.softmax_scale)
            return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
        if self.cp_group is not None:
            return self._split(query, key, value, packed_seq_params)
        return self._packed(query, key, value, packed_seq_params)

    def _split(self, query: Tensor, key: Tensor, value: Tensor, stream: Any) -> Tensor:
        """Attention of this rank's queries to the whole stream's keys and values. Other queries are zero, so every rank
        does the work of the whole stream."""
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        assert self.cp_group is not None
        parts = [stream_part(stream.cu_seqlens_q, c, self.cp_group.size()) for c in range(self.cp_group.size())]
        local, in_order = parts[self.cp_group.rank()], torch.cat(parts).argsort()
        # The backward pass reduce-scatters: a key's gradient is the sum over the queries of all ranks.
        k, v = (gather_from_sequence_parallel_region(x, group=self.cp_group)[in_order] for x in (key, value))
        q = query.new_zeros(len(in_order), *query.shape[1:]).index_copy(0, local, query)
        return self._packed(q, k, v, stream)[local]

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, stream: Any) -> Tensor:
        unfold, fold = segment_indices(stream.cu_seqlens_q, stream.max_seqlen_q)
        # Slots past a segment's end repeat the stream's first token; causality masks them.
        q, k, v = (x[unfold].transpose(1, 2) for x in (query, key, value))
        out = _causal_attention(q, k, v, self.softmax_scale).transpose(1, 2)
        return out.reshape(-1, *out.shape[2:])[fold].flatten(1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)


@once_per_stream
def segment_indices(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Gather indices stream -> [segments, max_seqlen], and flat ones back."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    offset = torch.arange(max_seqlen, device=cu_seqlens.device)
    inside = offset < lengths[:, None]
    return torch.where(inside, starts[:, None] + offset, 0), inside.flatten().nonzero()[:, 0]
