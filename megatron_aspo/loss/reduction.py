"""From per-token log-probs to one loss: masks, per-response quantities, KL, entropy, aggregation, metrics."""
# torch.unique is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_aspo.config import PolicyLossConfig
from megatron_aspo.loss.objectives import (
    GSPO_LOG_RATIO_LIMIT,
    LOG_RATIO_LIMIT,
    OBJECTIVES,
    TokenInputs,
    TokenTerms,
)
from megatron_aspo.types import LossOutput


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    config: PolicyLossConfig,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> LossOutput:
    """The policy loss of a batch of tokens, with gradient -w(r, A) * A in each token's log-prob.

    All tensors share one shape [..., T]. Masked slots may hold anything, NaN included.

    Args:
        logprobs: log pi(token), natural logarithm; differentiable.
        old_logprobs: the same under the policy held fixed during the update.
        advantages: one per token (outcome-supervised: equal within a response).
        loss_mask: bool, integer or float; non-zero marks response tokens.
        config: objective, clip ranges, aggregation, coefficients.
        entropy: the policy's entropy at the position, nats; needed by `entropy_quantile` and `entropy_coef`.
        ref_logprobs: log-probs of the reference policy; needed by `kl_coef`.
        rollout_logprobs: log-probs by the sampling engine; their mismatch with `old_logprobs` is reported.
        sequence_ids: non-negative integers that tell responses apart; default: each row is one response.

    Returns:
        LossOutput: mean loss = `loss_sum / denominator`.

    Raises:
        ValueError: shapes differ, or an input that the configuration needs is missing.

    Source: arXiv 2510.06062; the table of weights is in `megatron_aspo.loss.objectives`.
    """
    _check_inputs(
        logprobs,
        config,
        old_logprobs=old_logprobs,
        advantages=advantages,
        loss_mask=loss_mask,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        sequence_ids=sequence_ids,
    )
    mask = loss_mask != 0
    # The mask comes before any arithmetic: what stands in masked slots must not reach exp, sums or gradients.
    logprobs = _masked(logprobs, mask)
    old_logprobs = _masked(old_logprobs, mask).detach()
    advantages = _masked(advantages, mask).detach()
    responses = Responses.of(mask, sequence_ids)

    inputs = _token_inputs(logprobs.detach(), old_logprobs, advantages, mask, config, entropy, responses)
    terms = OBJECTIVES[config.objective](inputs, config)
    # The value is reported; the gradient comes from the second term, whose own value is exactly zero.
    token_loss = terms.value - terms.weight * advantages * (logprobs - logprobs.detach())

    metrics = _policy_metrics(terms, inputs, old_logprobs, mask)
    if entropy is not None:
        entropy = _masked(entropy, mask)
        token_loss = token_loss - config.entropy_coef * entropy if config.entropy_coef else token_loss
        metrics["entropy"] = _mean_over(entropy, mask)
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, _masked(ref_logprobs, mask).detach(), config.kl_estimator)
        token_loss = token_loss + config.kl_coef * kl if config.kl_coef else token_loss
        metrics["kl"] = _mean_over(kl, mask)
    if rollout_logprobs is not None:
        rollout_logprobs = _masked(rollout_logprobs, mask)
        metrics["rollout_logprob_diff"] = _mean_over((old_logprobs - rollout_logprobs).abs(), mask)
        metrics["rollout_kl"] = _mean_over(kl_estimate(rollout_logprobs, old_logprobs, "k3"), mask)

    loss_sum, denominator = _aggregate(torch.where(mask, token_loss, 0.0), mask, responses, config)
    metrics["value"] = (loss_sum.detach(), denominator)
    return LossOutput(loss_sum, denominator, metrics)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy, differentiable in `logprobs`.

    k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d with d = log pi - log ref (J. Schulman, "Approximating KL
    Divergence").
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    return torch.exp((-d).clamp(max=LOG_RATIO_LIMIT)) - 1 + d


@dataclass(frozen=True)
class Responses:
    """Which response each token belongs to, and sums over responses.

    Attributes:
        index: int64, same shape as the tokens, in [0, count).
        count: an upper bound of the number of responses (some may have no token).
        lengths: [count], unmasked tokens of each response.
    """

    index: Tensor
    count: int
    lengths: Tensor

    @staticmethod
    def of(mask: Tensor, sequence_ids: Tensor | None) -> Responses:
        if sequence_ids is None:
            rows = math.prod(mask.shape[:-1])
            index = torch.arange(rows, device=mask.device).view(*mask.shape[:-1], 1).expand(mask.shape)
        else:
            distinct, inverse = torch.unique(sequence_ids, return_inverse=True)
            rows, index = distinct.numel(), inverse.view(mask.shape)
        lengths = torch.zeros(rows, dtype=torch.float64, device=mask.device)
        lengths.index_add_(0, index.reshape(-1), mask.reshape(-1).double())
        return Responses(index, rows, lengths)

    def sum(self, values: Tensor) -> Tensor:
        """[..., T] -> [count]: sums of `values` (zero where masked) within responses."""
        zeros = torch.zeros(self.count, dtype=values.dtype, device=values.device)
        return zeros.index_add(0, self.index.reshape(-1), values.reshape(-1))

    def mean(self, values: Tensor) -> Tensor:
        """[..., T] -> [..., T]: each token gets the mean of its response."""
        return (self.sum(values) / self.lengths.clamp(min=1).to(values.dtype))[self.index]

    def quantile(self, values: Tensor, mask: Tensor, q: float) -> Tensor:
        """[..., T] -> [..., T]: each token gets the (linearly interpolated) q-quantile of its response."""
        if not values.numel():
            return values
        # Sort by (masked last, response, value): a response's tokens then stand together in ascending order.
        flat = values.reshape(-1)
        key = torch.where(mask, self.index, self.count).reshape(-1)
        by_value = torch.argsort(flat)
        order = by_value[torch.argsort(key[by_value], stable=True)]
        ascending = flat[order]
        lengths = self.lengths.long()
        start = lengths.cumsum(0) - lengths
        rank = q * (lengths - 1).clamp(min=0).to(values.dtype)
        lower = rank.floor().long()
        last = max(flat.numel() - 1, 0)
        at_lower = ascending[(start + lower).clamp(max=last)]
        at_upper = ascending[(start + torch.minimum(lower + 1, (lengths - 1).clamp(min=0))).clamp(max=last)]
        return torch.lerp(at_lower, at_upper, rank - lower)[self.index]


def _token_inputs(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: PolicyLossConfig,
    entropy: Tensor | None,
    responses: Responses,
) -> TokenInputs:
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clip_low = torch.full_like(ratio, config.clip_low)
    clip_high = torch.full_like(ratio, config.clip_high)
    if config.entropy_quantile is not None:
        assert entropy is not None  # checked with the other inputs
        entropy = _masked(entropy.detach(), mask)
        high = entropy > responses.quantile(entropy, mask, config.entropy_quantile)
        clip_low = clip_low.masked_fill(high, config.high_entropy_clip)
        clip_high = clip_high.masked_fill(high, config.high_entropy_clip)
    sequence_ratio = ratio
    if config.objective == "gspo":
        sequence_ratio = responses.mean(log_ratio).clamp(max=GSPO_LOG_RATIO_LIMIT).exp()
    elif config.objective == "response_mean_is":
        sequence_ratio = responses.mean(torch.where(mask, ratio, 0.0))
    return TokenInputs(logprobs, ratio, advantages, clip_low, clip_high, sequence_ratio)


def _aggregate(
    token_loss: Tensor, mask: Tensor, responses: Responses, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """(sum, denominator), both additive over micro-batches and ranks."""
    if config.aggregation == "token-mean":
        return token_loss.sum(), mask.sum()
    per_response = responses.sum(token_loss)
    if config.aggregation == "seq-mean-token-mean":
        per_response = per_response / responses.lengths.clamp(min=1).to(token_loss.dtype)
    elif config.aggregation == "seq-mean-token-sum-norm":
        assert config.norm_length is not None  # checked with the other inputs
        per_response = per_response / config.norm_length
    return per_response.sum(), (responses.lengths > 0).sum()


def _policy_metrics(
    terms: TokenTerms, x: TokenInputs, old_logprobs: Tensor, mask: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """What the update did, for A > 0 and A < 0 apart; tokens with A = 0 count in neither."""
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    for sign, chosen in (("pos", mask & (x.advantages > 0)), ("neg", mask & (x.advantages < 0))):
        metrics[f"ratio_{sign}"] = _mean_over(x.ratio, chosen)
        metrics[f"weight_{sign}"] = _mean_over(terms.weight, chosen)
        metrics[f"clip_fraction_{sign}"] = _mean_over(terms.hard_clipped, chosen)
        metrics[f"soft_clip_fraction_{sign}"] = _mean_over(terms.soft_clipped, chosen)
    # Samples come from the old policy, so k3 estimates KL(old || current).
    metrics["approx_kl"] = _mean_over(kl_estimate(old_logprobs, x.logprobs, "k3"), mask)
    metrics["nll"] = _mean_over(-x.logprobs, mask)
    return metrics


def _mean_over(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(chosen, values, 0.0).detach().sum(dtype=torch.float64), chosen.sum()


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0)


def _check_inputs(logprobs: Tensor, config: PolicyLossConfig, **others: Tensor | None) -> None:
    if not logprobs.is_floating_point() or logprobs.dim() == 0:
        raise ValueError(
            f"logprobs must be a floating-point tensor [..., T], not {logprobs.dtype} of {logprobs.dim()}-d"
        )
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, logprobs {list(logprobs.shape)}: they must agree")
    sequence_ids = others["sequence_ids"]
    if sequence_ids is not None and (sequence_ids.is_floating_point() or sequence_ids.dtype == torch.bool):
        raise ValueError(f"sequence_ids must be integers, not {sequence_ids.dtype}")
    needs = {
        "entropy": config.entropy_coef != 0 or config.entropy_quantile is not None,
        "ref_logprobs": config.kl_coef != 0,
    }
    for name, needed in needs.items():
        if needed and others[name] is None:
            raise ValueError(
                f"{name} is missing, but the configuration needs it (entropy_coef, entropy_quantile, kl_coef)"
            )
    if config.aggregation == "seq-mean-token-sum-norm" and config.norm_length is None:
        raise ValueError(
            "norm_length is missing: seq-mean-token-sum-norm divides by it; set the longest response's length"
        )
