"""The loss of tokens, element-wise: each token's gradient and reported value, as functions of its log-prob.

`TokenLoss.from_tokens` computes what belongs to whole responses and turns the aggregation into one scale per token. The
gradients are then element-wise: the fused head computes them chunk by chunk, `policy_loss` all at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.loss.correction import correction, dropped_responses
from megatron_aspo.loss.objectives import (
    LOG_RATIO_LIMIT,
    SEQUENCE_LOG_RATIO_LIMIT,
    Objective,
    TokenInputs,
    TokenTerms,
    find_objective,
    token_terms,
)
from megatron_aspo.loss.responses import Responses
from megatron_aspo.loss.tokens import LOWEST_LOGPROB, TokenBatch, usable


@dataclass(frozen=True)
class LossOutput:
    """A policy loss: its mean is `loss_sum / denominator`, after both were summed over micro-batches and ranks.

    Attributes:
        loss_sum: scalar, differentiable.
        denominator: scalar; the number of tokens or of responses, as the aggregation defines.
        metrics: name -> (sum, count), scalars without gradient; sum / count is the mean after summing over ranks.
        maxima: name -> scalar without gradient, to be reduced by maximum.
        logprobs, entropy: [..., T] per token, without gradient, 0 where masked; nats.
    """

    loss_sum: Tensor
    denominator: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]
    maxima: dict[str, Tensor]
    logprobs: Tensor
    entropy: Tensor | None


def needs_all_logprobs(config: PolicyLossConfig) -> bool:
    """Whether a token's gradient depends on the policy's log-probs or entropy at other tokens."""
    objective, _ = find_objective(config)
    return objective.response_ratio is not None or config.entropy_quantile is not None


@dataclass(frozen=True)
class TokenLoss:
    """A policy loss that waits for the policy's log-probs. All tensors but `denominator` are [N], without gradient.

    Attributes:
        objective, config: as `find_objective` returns them.
        tokens: flattened; 0 where masked.
        scale: the weight of the token's loss in the loss sum; 0 where masked.
        denominator: the divisor of the loss sum, after both were summed over micro-batches and ranks.
        sequence_ratio: the ratio of the token's response; None if the objective has none.
        entropy_limit: tokens of a larger entropy have the wider clip range; None if all have the same.
        factor: the rollout correction, which multiplies the policy gradient; None without rho.
        rollout_metrics: metrics of the correction, by name.
    """

    objective: Objective
    config: PolicyLossConfig
    tokens: TokenBatch
    scale: Tensor
    denominator: Tensor
    sequence_ratio: Tensor | None
    entropy_limit: Tensor | None
    factor: Tensor | None
    rollout_metrics: dict[str, Tensor]

    @staticmethod
    def from_tokens(
        tokens: TokenBatch,
        config: PolicyLossConfig,
        cp_group: dist.ProcessGroup | None,
        logprobs: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> TokenLoss:
        """From flattened tokens, and the policy's log-probs and entropy [N] for `needs_all_logprobs`. At most one small
        collective, over `cp_group`, if the configuration needs whole responses."""
        objective, config = find_objective(config)
        mask, ids, dtype = tokens.loss_mask, tokens.sequence_ids, tokens.advantages.dtype
        assert ids is not None  # flattened tokens have them
        needed: dict[str, Tensor] = {}
        if objective.response_ratio is not None:
            assert logprobs is not None
            now, anchor = usable(logprobs, mask), tokens.anchor_logprobs(config)
            needed["log_ratio"] = now - (now if anchor is None else anchor)
            if objective.response_ratio == "clipped geometric":
                needed["advantages"] = tokens.advantages
        if config.entropy_quantile is not None:
            assert entropy is not None
            needed["entropy"] = torch.where(mask, entropy, 0.0)
        rollout_log_ratio = None
        if config.anchor == "trainer" and tokens.rollout_logprobs is not None and tokens.old_logprobs is not None:
            rollout_log_ratio = tokens.old_logprobs - tokens.rollout_logprobs
        if config.drops_responses:
            assert rollout_log_ratio is not None  # checked with the tokens
            needed["rollout_log_ratio"] = rollout_log_ratio

        ratio = limit = dropped = factor = None
        metrics: dict[str, Tensor] = {}
        scale, denominator = mask.double(), mask.sum()
        if needed or config.aggregation != "token-mean":
            responses, whole = Responses.from_ids(mask, ids, cp_group, needed)
            wide = None
            if config.entropy_quantile is not None:
                limits = responses.quantile(whole["entropy"], config.entropy_quantile).to(dtype)
                limit, wide = responses.spread(limits), whole["entropy"] > limits[responses.index]
            if objective.response_ratio is not None:
                ratio = responses.spread(_response_ratio(objective, responses, whole, wide, config, dtype)).to(dtype)
            if config.drops_responses:
                dropped = responses.spread(dropped_responses(responses, whole["rollout_log_ratio"], config))
            if config.aggregation != "token-mean":
                denominator = responses.count()
            if config.aggregation == "seq-mean-token-mean":
                scale = scale / responses.spread(responses.lengths).clamp(min=1)
            elif config.aggregation == "seq-mean-token-sum-norm":
                assert config.norm_length is not None  # checked with the tokens
                scale = scale / config.norm_length
        if rollout_log_ratio is not None:
            factor, metrics = correction(rollout_log_ratio, dropped, config)
        return TokenLoss(objective, config, tokens, scale.to(dtype), denominator, ratio, limit, factor, metrics)

    def __getitem__(self, chosen: slice | Tensor) -> TokenLoss:
        """The loss of some of the tokens, for their gradients; the denominator stays that of all."""
        return replace(self, tokens=replace(self.tokens, **_columns(self.tokens, chosen)), **_columns(self, chosen))

    def terms(
        self, logprobs: Tensor, entropy: Tensor | None, check_finite: bool = True
    ) -> tuple[TokenInputs, TokenTerms]:
        """The inputs and the result of the objective. Tokens that the anchor leaves out have weight and value 0 and are
        not held at the cap, while the mask is still told. `logprobs` are 0 where masked."""
        config = self.config
        assert self.entropy_limit is None or entropy is not None  # checked with the tokens
        wide = None if self.entropy_limit is None or entropy is None else entropy > self.entropy_limit
        clip_low, clip_high = _clip_range(logprobs, wide, config)
        anchor = self.tokens.anchor_logprobs(config)
        log_ratio = torch.zeros_like(logprobs) if anchor is None else logprobs - anchor
        ratio = _ratio(log_ratio)
        sequence_ratio = ratio if self.sequence_ratio is None else self.sequence_ratio
        inputs = TokenInputs(logprobs, ratio, self.tokens.advantages, clip_low, clip_high, sequence_ratio)
        terms = token_terms(self.objective, inputs, config, self.tokens.loss_mask, check_finite)
        if config.anchor == "rollout":
            left_out = _left_out(log_ratio, config)
            kept = {name: getattr(terms, name).masked_fill(left_out, 0) for name in ("weight", "value", "soft_clipped")}
            terms = replace(terms, **kept)
        return inputs, terms

    def gradients(self, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The loss sum's gradients in the log-probs and in the entropy (None without an entropy bonus)."""
        config, tokens = self.config, self.tokens
        logprobs = usable(logprobs, tokens.loss_mask)
        _, terms = self.terms(logprobs, entropy, check_finite=False)  # `output` checks all tokens at once
        grad = -terms.weight * tokens.advantages
        if self.factor is not None:
            grad = grad * self.factor
        if config.kl_coef:
            assert tokens.ref_logprobs is not None  # checked with the tokens
            _, slope = kl_terms(logprobs, tokens.ref_logprobs, config.kl_estimator)
            grad = grad + self._at_kl_tokens(config.kl_coef * slope, entropy)
        return grad * self.scale, -config.entropy_coef * self.scale if config.entropy_coef else None

    def output(self, logprobs: Tensor, entropy: Tensor | None, shape: Sequence[int]) -> LossOutput:
        """Value and metrics, without gradient, from the log-probs [N] of all tokens.

        Metrics are means over the unmasked tokens as `name`, over those with A > 0 as `name_pos`, with A < 0 as
        `name_neg`. The first four have a meaning only with a sign of the advantage.
        """
        config, tokens, mask = self.config, self.tokens, self.tokens.loss_mask
        masked = usable(logprobs, mask)
        inputs, terms = self.terms(masked, entropy)
        token_loss = terms.value if self.factor is None else terms.value * self.factor
        anchor = tokens.anchor_logprobs(config)
        anchor = masked if anchor is None else _known(anchor, masked)
        by_sign = {
            "ratio": inputs.ratio,
            "weight": terms.weight,
            "clip_fraction": terms.hard_clipped,
            "soft_clip_fraction": terms.soft_clipped,
        }
        # Samples come from the anchor's policy, so k3 estimates KL(anchor || current).
        by_token = {"approx_kl": kl_terms(anchor, masked, "k3")[0], "nll": -masked}
        maxima = {"log_ratio_max": _largest((masked - anchor).abs(), mask)}
        if config.anchor_band is not None:
            assert tokens.rollout_logprobs is not None  # checked with the tokens
            by_token["anchor_cut"] = _left_out(masked - tokens.rollout_logprobs, config)
        if entropy is not None:
            by_token["entropy"] = entropy
            if config.entropy_coef:
                token_loss = token_loss - config.entropy_coef * torch.where(mask, entropy, 0.0)
        if tokens.ref_logprobs is not None:
            by_token["kl"], _ = kl_terms(masked, tokens.ref_logprobs, config.kl_estimator)
            if config.kl_coef:
                token_loss = token_loss + self._at_kl_tokens(config.kl_coef * by_token["kl"], entropy)
        if tokens.rollout_logprobs is not None and (config.anchor == "trainer" or tokens.old_logprobs is not None):
            old = masked if tokens.old_logprobs is None else tokens.old_logprobs
            sampler = _known(tokens.rollout_logprobs, old)
            by_token["rollout_logprob_diff"] = (old - sampler).abs()
            by_token["rollout_kl"], _ = kl_terms(sampler, old, "k3")
            if config.anchor == "rollout":
                by_token["update_logprob_diff"] = (masked - old).abs()
        if self.factor is not None:
            by_token |= self.rollout_metrics
            maxima["rollout_ratio_max"] = _largest(self.rollout_metrics["rollout_ratio"], mask)
        loss_sum = (torch.where(mask, token_loss, 0.0) * self.scale).sum()
        signs = {"_pos": mask & (tokens.advantages > 0), "_neg": mask & (tokens.advantages < 0)}
        metrics = _means(by_sign, signs) | _means(by_token, {"": mask, **signs})
        return LossOutput(
            loss_sum,
            self.denominator,
            metrics | {"value": (loss_sum, self.denominator)},
            maxima,
            torch.where(mask, logprobs, 0.0).view(*shape),
            None if entropy is None else torch.where(mask, entropy, 0.0).view(*shape),
        )

    def _at_kl_tokens(self, values: Tensor, entropy: Tensor | None) -> Tensor:
        """`values`, with 0 at tokens that have no KL term."""
        if self.config.kl_tokens == "all":
            return values
        assert entropy is not None  # both are checked with the tokens
        assert self.entropy_limit is not None
        return values.masked_fill(entropy > self.entropy_limit, 0.0)


def _columns(record: TokenLoss | TokenBatch, chosen: slice | Tensor) -> dict[str, Any]:
    """The chosen tokens of a record's [N] tensors."""
    tensors = {name: value for name, value in vars(record).items() if isinstance(value, Tensor) and value.dim()}
    return {name: tensor[chosen] for name, tensor in tensors.items()}


def _clip_range(like: Tensor, wide: Tensor | None, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """`clip_low` and `clip_high` of each token, shaped and typed as `like`; `wide` tokens have `high_entropy_clip`."""
    low, high = torch.full_like(like, config.clip_low), torch.full_like(like, config.clip_high)
    if wide is None:
        return low, high
    return low.masked_fill(wide, config.high_entropy_clip), high.masked_fill(wide, config.high_entropy_clip)


def _response_ratio(
    objective: Objective,
    responses: Responses,
    whole: Mapping[str, Tensor],
    wide: Tensor | None,
    config: PolicyLossConfig,
    dtype: torch.dtype,
) -> Tensor:
    """[M] log-ratios of tokens -> [M] ratios of responses; 1 for a response of which no token counts.

    Tokens that the anchor leaves out do not count: the sampler's rounding of one would weigh on all others.
    """
    log_ratio, counted = whole["log_ratio"], responses.mask
    if config.anchor == "rollout":
        counted = counted & ~_left_out(log_ratio.to(dtype), config)
    if objective.response_ratio == "clipped geometric":
        low, high = _clip_range(log_ratio, wide, config)
        positive = whole["advantages"] > 0
        log_ratio = torch.where(positive, torch.minimum(log_ratio, high), torch.maximum(log_ratio, -low))
    if objective.response_ratio != "arithmetic":
        return responses.mean(log_ratio, counted).clamp(max=SEQUENCE_LOG_RATIO_LIMIT).exp()
    return responses.mean(_ratio(log_ratio), counted, empty=1.0)


def kl_terms(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """Per-token estimate of KL(policy || reference) from samples of the policy, and its derivative in `logprobs`.

    k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d with d = log pi - log ref (J. Schulman, "Approximating KL
    Divergence"). The derivatives are 1, d and 1 - exp(-d). Under the clamp of exp the last keeps its sign.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "k2":
        return 0.5 * d.square(), d
    inverse = torch.exp((-d).clamp(max=LOG_RATIO_LIMIT))
    return inverse - 1 + d, 1 - inverse


def _means(values: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """name + suffix -> (sum, count) of the values [N] over the tokens that `chosen` has for the suffix."""
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    counts = {suffix: tokens.sum() for suffix, tokens in chosen.items()}
    for name, column in values.items():
        for suffix, tokens in chosen.items():
            # float64: a float32 sum over millions of tokens loses the third digit.
            metrics[name + suffix] = column.double().masked_fill(~tokens, 0.0).sum(), counts[suffix]
    return metrics


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _known(sampler: Tensor, otherwise: Tensor) -> Tensor:
    """Log-probs of the sampler, `otherwise` where they are missing: one such token would outweigh all in a mean."""
    return torch.where(sampler < -LOWEST_LOGPROB, sampler, otherwise)


def _left_out(log_ratio: Tensor, config: PolicyLossConfig) -> Tensor:
    """Log-ratios to the sampler -> bool: no log-prob of the sampler, or a ratio outside the anchor's band."""
    missing = log_ratio <= LOWEST_LOGPROB
    if config.anchor_band is None:
        return missing
    ratio, (low, high) = _ratio(log_ratio), config.anchor_band
    return missing | (ratio < low) | (ratio > high)


def _largest(values: Tensor, chosen: Tensor) -> Tensor:
    """The largest of the chosen values; 0 if there is none."""
    return values.masked_fill(~chosen, 0.0).amax() if values.numel() else values.new_zeros(())
