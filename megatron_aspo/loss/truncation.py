"""Top-k and top-p over a vocabulary that is split over ranks, without gathering it.

Both keep a token iff the weight of all tokens with a larger logit is below a limit: their number below k, or
their mass below p. So both are one threshold per row, which a radix select finds exactly in four rounds of
8 bits: each adds up, over ranks, the weights of the logits in 256 bins.
"""
# torch.distributed is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.loss import softmax, validation
from megatron_aspo.loss.collectives import group_size

_BITS = 8
_BINS = 1 << _BITS
_MINUS_INF_KEY = 0x007FFFFF
"""Where all tokens together weigh less than the limit; keys below it are NaNs."""


def check(top_k: int | None, top_p: float | None) -> None:
    if top_k is not None:
        validation.check_counts(top_k=top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")


def threshold(
    logits: Tensor,
    tp_group: dist.ProcessGroup | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Tensor | None:
    """[n, V/tp] -> [n] float32: the smallest logit (before the temperature) that is kept; None if all are."""
    lowest = None
    if top_k is not None:
        lowest = _select(logits, None, None, float(top_k), tp_group, temperature)
    if top_p is not None and top_p < 1:
        nowhere = torch.full(logits.shape[:1], -1, dtype=torch.long, device=logits.device)
        stats = softmax.statistics(logits, nowhere, temperature, lowest)
        log_normalizer, _, _ = softmax.merge(softmax.gather(stats, tp_group))
        nucleus = _select(logits, log_normalizer, lowest, top_p, tp_group, temperature)
        lowest = nucleus if lowest is None else torch.maximum(lowest, nucleus)
    return lowest


def _select(
    logits: Tensor,
    log_normalizer: Tensor | None,
    lowest: Tensor | None,
    limit: float,
    tp_group: dist.ProcessGroup | None,
    temperature: float,
) -> Tensor:
    """The smallest logit such that the weight of all larger ones is below `limit`; [n] float32.

    A logit weighs its probability, 0 below `lowest`; without `log_normalizer` it weighs 1.
    """
    n = logits.shape[0]
    above = torch.zeros(n, dtype=torch.float64, device=logits.device)
    prefix = torch.zeros(n, dtype=torch.long, device=logits.device)
    for shift in range(32 - _BITS, -1, -_BITS):
        bins = torch.zeros(n, _BINS, dtype=torch.float64, device=logits.device)
        for rows in softmax.tiles(logits):
            key = _ordered_key(logits[rows])
            inside = key >> (shift + _BITS) == prefix[rows, None]
            if log_normalizer is None:
                weight = inside.double()
            else:
                z = softmax.tempered(logits[rows], temperature, None if lowest is None else lowest[rows])
                weight = torch.where(inside, z.sub_(log_normalizer[rows, None]).exp_(), 0.0).double()
            bins[rows].scatter_add_(1, key >> shift & (_BINS - 1), weight)
        if group_size(tp_group) > 1:
            dist.all_reduce(bins, group=tp_group)
        larger = above[:, None] + bins.flip(1).cumsum(1).flip(1) - bins  # weight above each bin
        digit = (larger < limit).int().argmax(1)  # the lowest bin that is still kept: `larger` falls with the bin
        above = larger.gather(1, digit[:, None])[:, 0]
        prefix = prefix << _BITS | digit
    return _from_ordered_key(prefix.clamp(min=_MINUS_INF_KEY))


def _ordered_key(logits: Tensor) -> Tensor:
    """float32 as an unsigned 32-bit integer (in int64) of the same order."""
    bits = logits.float().view(torch.int32).long()
    return torch.where(bits >= 0, bits + (1 << 31), ~bits & 0x7FFFFFFF)


def _from_ordered_key(key: Tensor) -> Tensor:
    bits = torch.where(key >= 1 << 31, key - (1 << 31), ~key & 0xFFFFFFFF)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)
