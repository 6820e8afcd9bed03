"""Tokens to experts and back: Transformer Engine's Triton kernels, which need a GPU, in torch operations.

The functions have the names and signatures of `transformer_engine.pytorch.triton.permutation`, of which `install`
replaces them. Source: transformer_engine/common/triton/permutation.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """[tokens, experts] mask -> [tokens, 2 experts + 1], int32.

    A row has, for its n experts, the n rows of the permuted tensor in descending order, from column `experts` on the n
    experts, and n in the last column. The permuted tensor has the tokens of expert 0 first, in order.
    """
    mask = routing_map.bool()
    flat = mask.t().flatten()
    rows = torch.where(flat, flat.cumsum(0) - 1, -1).view(num_experts, num_tokens).t()
    ordered, experts = rows.sort(dim=1, descending=True, stable=True)
    count = mask.sum(1, keepdim=True)
    return torch.cat([ordered, experts, count], 1).to(torch.int32)


def _routes(row_id_map: Tensor, num_experts: int, pad_offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(token, expert, permuted row) of every route, those of a token in the order of the map."""
    slots = torch.arange(num_experts) < row_id_map[:, -1:]
    tokens = slots.nonzero()[:, 0]
    rows, experts = (part[slots].long() for part in row_id_map[:, :-1].split(num_experts, 1))
    return tokens, experts, rows if pad_offsets is None else rows + pad_offsets[experts]


def permute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    scale: Tensor | None,
    pad_offsets: Tensor | None,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
    scale_hidden_dim: int | None,
) -> tuple[Tensor, None, Tensor | None]:
    """[tokens, h] and [tokens, experts] -> [rows, h], None and [rows]; rows of probability 0 and padding are 0."""
    assert scale is None, "quantized tokens"
    tokens, experts, rows = _routes(row_id_map, num_experts, pad_offsets)
    values = inp[tokens]
    permuted_probs = None
    if probs is not None:
        chosen = probs[tokens, experts]
        permuted_probs = probs.new_zeros(num_out_tokens).index_copy(0, rows, chosen)
        values = torch.where(chosen[:, None] == 0, 0, values)
    return inp.new_zeros(num_out_tokens, hidden_size).index_copy(0, rows, values), None, permuted_probs


def unpermute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None,
    permuted_probs: Tensor | None,
    pad_offsets: Tensor | None,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
) -> tuple[Tensor, Tensor | None]:
    """[rows, h] -> [tokens, h], a token's rows summed in float32 in the order of the map and rounded once; [rows]
    probabilities -> [tokens, experts]."""
    assert merging_probs is None, "probabilities are applied within the experts"
    tokens, experts, rows = _routes(row_id_map, num_experts, pad_offsets)
    output = torch.zeros(num_tokens, hidden_size).index_add(0, tokens, inp[rows].float())
    probs = None
    if permuted_probs is not None:
        probs = permuted_probs.new_zeros(num_tokens, num_experts)
        probs[tokens, experts] = permuted_probs[rows]
    return output.to(inp.dtype), probs


def make_chunk_sort_map(split_sizes: Tensor, sorted_indices: Tensor, num_tokens: int, num_splits: int) -> Tensor:
    """The row that each row goes to, [tokens] int32, when chunks of `split_sizes` are put in the order
    `sorted_indices`. Rows beyond the chunks stay."""
    sizes = split_sizes.long()
    starts = sizes.cumsum(0) - sizes
    order = sorted_indices.long()
    sources = [torch.arange(int(starts[i]), int(starts[i] + sizes[i])) for i in order.tolist()]
    source = torch.cat([*sources, torch.arange(int(sizes.sum()), num_tokens)])
    target = torch.empty(num_tokens, dtype=torch.int32)
    target[source] = torch.arange(num_tokens, dtype=torch.int32)
    return target


def sort_chunks_by_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, num_tokens: int, hidden_size: int, is_forward: bool
) -> tuple[Tensor, Tensor | None]:
    """Move the rows of [tokens, h] and of [tokens] by a map of `make_chunk_sort_map`, or back."""
    target = row_id_map.long()
    source = target.argsort() if is_forward else target
    return inp[source], None if probs is None else probs[source]


def replace_in(module: Any) -> None:
    """Put these functions into `transformer_engine.pytorch.triton.permutation`."""
    for function in (
        make_row_id_map,
        permute_with_mask_map,
        unpermute_with_mask_map,
        make_chunk_sort_map,
        sort_chunks_by_map,
    ):
        assert hasattr(module, function.__name__)
        setattr(module, function.__name__, function)
