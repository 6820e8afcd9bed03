"""The correction of the trainer-sampler mismatch: a factor rho = pi_old / pi_rollout on the policy gradient.

The sampler's numerics are not the trainer's, so its samples come from a slightly different policy. The factor has no
gradient. It is separate from the objective's importance ratio pi / pi_old, and never flipped.
Sources: truncated importance sampling (TIS), F. Yao et al., "Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training" (2025); masking outside a band (IcePop), Ling team, "Every Step Evolves",
arXiv 2510.18855; masks of whole responses, J. Liu et al., "When Speed Kills Stability" (2025).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.loss.objectives import LOG_RATIO_LIMIT
from megatron_aspo.loss.responses import Responses


def correction(log_ratio: Tensor, dropped: Tensor | None, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The factor of the policy gradient, and metrics: rho, where it was cut, where responses are dropped; [N] each.

    Args:
        log_ratio: [N] log rho, 0 where masked.
        dropped: [N] bool, or None if no response can be dropped.
    """
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    low, high = config.rollout_ratio_low, config.rollout_ratio_high
    cut = torch.zeros_like(ratio, dtype=torch.bool)
    factor = torch.ones_like(ratio)
    if config.rollout_correction == "truncate":
        cut = ratio > high
        factor = ratio.clamp(max=high)
    elif config.rollout_correction == "mask":
        cut = (ratio < low) | (ratio > high)
        factor = ratio.masked_fill(cut, 0.0)
    if dropped is None:
        dropped = torch.zeros_like(cut)
    metrics = {"rollout_ratio": ratio, "rollout_cut": cut, "rollout_dropped": dropped}
    return factor.masked_fill(dropped, 0.0), metrics


def dropped_responses(responses: Responses, log_ratio: Tensor, config: PolicyLossConfig) -> Tensor:
    """[M] log rho of the whole stream, 0 where masked -> [count] bool, the responses that the configuration drops."""
    low, high = config.rollout_sequence_band
    geometric_mean = responses.mean(log_ratio, responses.mask).exp()
    dropped = (geometric_mean < low) | (geometric_mean > high)
    if config.rollout_veto is not None:
        dropped |= responses.minimum(log_ratio) < math.log(config.rollout_veto)
    return dropped
