"""How far the sampler's log-probs are from the trainer's, for the same tokens and, it is hoped, the same weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_aspo.policy.trainer import UpdateMetrics
from megatron_aspo.types import MicroBatch

RATIO_BAND = (0.5, 2.0)


def measure_mismatch(mini_batches: Sequence[Sequence[MicroBatch]]) -> dict[str, float]:
    """Over all response tokens of all ranks, with d = log π_old - log π_rollout in nats; the same on every rank.
    Collective; `old_logprobs` must have been filled in.

    Returns:
        logprob_diff: mean of `|d|`.
        logprob_diff_max: largest `|d|`.
        logprob_bias: mean of d; with the same distributions it is about -kl.
        kl: mean of exp(d) - 1 - d, an estimate of KL(π_rollout || π_old) that is never negative (k3).
        outside: share of tokens whose ratio exp(d) lies outside `RATIO_BAND`.
    """
    metrics = UpdateMetrics()
    parts = [
        (batch.old_logprobs - batch.rollout_logprobs)[batch.loss_mask].double()
        for batches in mini_batches
        for batch in batches
        if batch.old_logprobs is not None and batch.rollout_logprobs is not None
    ]
    if parts:  # elsewhere than on the last pipeline stage there are none
        d = torch.cat(parts)
        ratio = d.exp()
        low, high = RATIO_BAND
        count = d.new_tensor(float(len(d)))
        for name, values in (
            ("logprob_diff", d.abs()),
            ("logprob_bias", d),
            ("kl", torch.expm1(d) - d),
            ("outside", ((ratio < low) | (ratio > high)).double()),
        ):
            metrics.sums[name] = torch.stack([values.sum(), count])
        metrics.maxima["logprob_diff_max"] = d.abs().max() if len(d) else d.new_zeros(())
    return metrics.reduce()
