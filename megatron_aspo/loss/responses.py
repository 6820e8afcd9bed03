"""Per-response quantities (lengths, means, quantiles), exact also where context parallelism splits responses."""
# torch.distributed is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.loss.collectives import all_gather, group_rank, group_size


@dataclass(frozen=True)
class Responses:
    """The responses of a stream of M = cp N tokens, of which this context-parallel rank holds N.

    Per-response tensors have M slots, since there are at most M responses; unused slots have length 0. Their number
    depends on no value, so a GPU need not be waited for.

    Attributes:
        index: [M] int64, the slot of the response that a token belongs to.
        mask: [M] bool.
        lengths: [M] float64, unmasked tokens of each response; some responses may have none.
        own: the place of this rank's tokens in the stream.
    """

    index: Tensor
    mask: Tensor
    lengths: Tensor
    own: slice

    @staticmethod
    def from_ids(
        mask: Tensor, sequence_ids: Tensor, cp_group: dist.ProcessGroup | None, values: Mapping[str, Tensor]
    ) -> tuple[Responses, dict[str, Tensor]]:
        """The responses, and `values` (name -> [N], 0 where masked) of the whole stream in float64. One all-gather if
        `cp_group` has ranks; equal ids are one response on all of them."""
        tokens, ranks = mask.numel(), group_size(cp_group)
        # float64 holds ids and float32 values exactly.
        rows = torch.stack([row.double() for row in (mask, sequence_ids, *values.values())])
        if ranks > 1:
            rows = all_gather(rows, cp_group).view(ranks, *rows.shape).transpose(0, 1).flatten(1)
        ascending, order = rows[1].sort()
        slots = torch.zeros_like(order)
        slots[1:] = (ascending[1:] != ascending[:-1]).cumsum(0)
        index = torch.empty_like(order).scatter_(0, order, slots)
        lengths = torch.zeros_like(ascending).index_add_(0, index, rows[0])
        first = group_rank(cp_group) * tokens
        own = slice(first, first + tokens)
        return Responses(index, rows[0] != 0, lengths, own), dict(zip(values, rows[2:], strict=True))

    def spread(self, per_response: Tensor) -> Tensor:
        """[M] per response -> [N]: the value of the response of each of this rank's tokens."""
        return per_response[self.index[self.own]]

    def count(self) -> Tensor:
        """Responses with an unmasked token; 0 on all ranks of the context-parallel group but the first."""
        return (self.lengths > 0).sum() * (self.own.start == 0)

    def mean(self, values: Tensor, counted: Tensor, empty: float = 0.0) -> Tensor:
        """[M] per token -> [M] per response: the means over the tokens `counted` [M]; `empty` where there is none."""
        counts = torch.zeros_like(self.lengths).index_add(0, self.index, counted.double())
        sums = torch.zeros_like(self.lengths).index_add(0, self.index, values.masked_fill(~counted, 0.0))
        return torch.where(counts > 0, sums / counts.clamp(min=1), empty)

    def minimum(self, values: Tensor) -> Tensor:
        """[M] per token, 0 where masked -> [M] per response: the least value, at most 0."""
        return torch.zeros_like(self.lengths).scatter_reduce(0, self.index, values, "amin")

    def quantile(self, values: Tensor, q: float) -> Tensor:
        """[M] per token -> [M] per response: the linearly interpolated q-quantile of the unmasked values."""
        if not values.numel():
            return torch.zeros_like(self.lengths)
        # Sort by (masked last, response, value): a response's tokens then stand together in ascending order.
        key = torch.where(self.mask, self.index, self.lengths.numel())
        by_value = torch.argsort(values)
        ascending = values[by_value[torch.argsort(key[by_value], stable=True)]]
        lengths = self.lengths.long()
        start = lengths.cumsum(0) - lengths
        rank = q * (lengths - 1).clamp(min=0).double()
        lower = rank.floor().long()
        upper = torch.minimum(lower + 1, (lengths - 1).clamp(min=0))
        last = values.numel() - 1
        at_lower, at_upper = ascending[(start + lower).clamp(max=last)], ascending[(start + upper).clamp(max=last)]
        return torch.lerp(at_lower, at_upper, rank - lower)
