"""What belongs to a whole response: lengths, means, quantiles; also where context parallelism splits it."""
# torch.unique and torch.distributed are not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.loss.collectives import all_gather, group_rank, group_size


@dataclass(frozen=True)
class Responses:
    """The responses of a stream of M = cp N tokens, of which this context-parallel rank holds N.

    Attributes:
        index: [M] int64 in [0, count), which response a token belongs to.
        mask: [M] bool.
        lengths: [count] float64, unmasked tokens of each response; some may have none.
        own: where this rank's tokens stand in the stream.
        counted_here: whether this rank reports the number of responses: one rank of the group does.
    """

    index: Tensor
    mask: Tensor
    lengths: Tensor
    own: slice
    counted_here: bool

    @staticmethod
    def of(
        mask: Tensor, sequence_ids: Tensor, cp_group: dist.ProcessGroup | None, values: Sequence[Tensor] = ()
    ) -> tuple[Responses, list[Tensor]]:
        """The responses, and `values` for the whole stream in float64. One all-gather if `cp_group` has ranks.

        Args:
            mask, sequence_ids: [N], of this rank's tokens; an id means the same response on all ranks.
            values: [N] each, 0 where masked.
        """
        tokens = mask.numel()
        # float64 carries ids and float32 values exactly.
        rows = torch.stack([row.double() for row in (mask, sequence_ids, *values)])
        if group_size(cp_group) > 1:
            rows = all_gather(rows, cp_group).view(group_size(cp_group), *rows.shape).transpose(0, 1).flatten(1)
        whole_mask = rows[0] != 0
        distinct, index = torch.unique(rows[1], return_inverse=True)
        lengths = torch.zeros(distinct.numel(), dtype=torch.float64, device=mask.device)
        lengths.index_add_(0, index, rows[0])
        first = group_rank(cp_group) * tokens
        own = slice(first, first + tokens)
        return Responses(index, whole_mask, lengths, own, group_rank(cp_group) == 0), list(rows[2:])

    def spread(self, per_response: Tensor) -> Tensor:
        """[count] -> [N]: each of this rank's tokens gets its response's value."""
        return per_response[self.index[self.own]]

    def count(self) -> Tensor:
        """How many responses have a token; 0 on all ranks of the context-parallel group but one."""
        return (self.lengths > 0).sum() * self.counted_here

    def mean(self, values: Tensor) -> Tensor:
        """[M] -> [count]: means of `values` (0 where masked) over responses."""
        return torch.zeros_like(self.lengths).index_add(0, self.index, values) / self.lengths.clamp(min=1)

    def minimum(self, values: Tensor) -> Tensor:
        """[M] -> [count]: the least of `values` (0 where masked) and 0."""
        return torch.zeros_like(self.lengths).scatter_reduce(0, self.index, values, "amin")

    def quantile(self, values: Tensor, q: float) -> Tensor:
        """[M] -> [count]: the (linearly interpolated) q-quantile of each response's unmasked values."""
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
