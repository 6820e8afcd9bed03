"""ASPO in verl: importing this module registers the policy loss "aspo", and its controls. See README.md."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss

from megatron_aspo.loss import PolicyLossConfig, policy_loss


@register_policy_loss("aspo")
def aspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    objective: str = "aspo",
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a micro-batch [responses, tokens]: its share of the mean over the global batch, times the
    data-parallel size.

    Clip ranges are the actor's clip_ratio_low, clip_ratio_high and clip_ratio_c; entropy and KL terms stay verl's.
    """
    batch = config.global_batch_info
    summed = loss_agg_mode == "token-sum"
    norm = loss_agg_mode == "seq-mean-token-sum-norm"
    loss = PolicyLossConfig(
        objective=objective,
        clip_low=config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        clip_high=config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
        dual_clip=config.clip_ratio_c,
        aggregation="token-mean" if summed else loss_agg_mode,
        norm_length=(batch.get("loss_scale_factor") or response_mask.shape[-1]) if norm else None,
    )
    if rollout_is_weights is not None:  # a positive factor may multiply the advantage as well as the gradient
        advantages = advantages * rollout_is_weights
    out = policy_loss(log_prob, old_log_prob, advantages, response_mask, loss)

    of_all_ranks = batch.get("batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size")
    ranks = batch.get("dp_size", 1)
    if of_all_ranks is None and ranks > 1 and not summed:
        raise ValueError(f"verl gave no size of the global batch for loss_agg_mode={loss_agg_mode} on {ranks} ranks")
    denominator = 1 if summed else out.denominator.clamp(min=1) if of_all_ranks is None else of_all_ranks
    return out.loss_sum / denominator * ranks, _means(out.metrics)


for control in ("aspo_unmasked", "no_is_pos", "up", "tis", "no_is", "response_mean_is"):
    register_policy_loss(control)(partial(aspo, objective=control))


def _means(metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Means over all tokens of the micro-batch, in one transfer from the GPU; `value` has the loss's own mean.

    verl averages over micro-batches, many of which have advantages of one sign only. Tokens of the other sign add 0 to
    a metric, and 1 to a ratio or weight.
    """
    tokens = metrics["nll"][1]
    neutral = {name: tokens - pair[1] for name, pair in metrics.items() if name.startswith(("ratio_", "weight_"))}
    totals = [(total + neutral.get(name, 0)).double() for name, (total, _) in metrics.items()]
    counts = [count if name == "value" else tokens for name, (_, count) in metrics.items()]
    means = (torch.stack(totals) / torch.stack(counts).clamp(min=1e-6)).tolist()
    return {f"actor/{name}": mean for name, mean in zip(metrics, means, strict=True)}
