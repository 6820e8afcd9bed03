"""The objectives: each is a weight per token, the defaults that belong to it, and the response-wise ratio it needs.

The gradient of every objective is dL/dl = -w(r, A) * A, with l the token's log-prob, r its importance ratio pi / pi_old
(`anchor="rollout"`: pi / pi_rollout), A its advantage, and w a weight without gradient. An objective is therefore its
weight function. The *reported* loss follows each paper's convention; it is for logging only, and no gradient flows
through it.

All functions are element-wise: every tensor has the shape of the log-probs. Sources: ASPO arXiv 2510.06062;
PPO 1707.06347; DAPO 2503.14476; dual clip 1912.09729; CISPO 2506.13585; GSPO 2507.18071; SAPO 2511.20347;
UP 2607.06987; DPPO 2602.04879; GMPO 2507.20673.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_aspo.config.import_path import import_object
from megatron_aspo.config.loss import ObjectiveName, PolicyLossConfig
from megatron_aspo.errors import RunError, UserError

LOG_RATIO_LIMIT = 20.0
"""log r is clamped to [-20, 20] before exp, so that no ratio overflows float32."""

SEQUENCE_LOG_RATIO_LIMIT = 10.0
"""Upper clamp of a response's mean log-ratio (GSPO)."""


@dataclass(frozen=True)
class TokenInputs:
    """The arguments of a weight function; one entry per token, without gradient.

    Attributes:
        logprobs: log pi of the token.
        ratio: r = exp(clamp(log pi - log pi_old)); with `anchor="rollout"` pi_rollout stands for pi_old.
        advantages: A.
        clip_low, clip_high: the clip range of each token.
        sequence_ratio: the response's ratio, as `Objective.response_ratio` defines it; equal to `ratio` without one.
    """

    logprobs: Tensor
    ratio: Tensor
    advantages: Tensor
    clip_low: Tensor
    clip_high: Tensor
    sequence_ratio: Tensor


@dataclass(frozen=True)
class TokenTerms:
    """The result of a weight function: the weight w and the reported loss value of each token, and where clips acted.

    Attributes:
        hard_clipped: the gradient was dropped (w = 0), or the ratio was held at the clip (CISPO).
        soft_clipped: the weight was held at the dual clip c and the gradient kept.
    """

    weight: Tensor
    value: Tensor
    hard_clipped: Tensor
    soft_clipped: Tensor

    @staticmethod
    def from_weight(x: TokenInputs, weight: Tensor, clipped: Tensor | None = None) -> TokenTerms:
        """Terms whose reported value is -w A l, the function that has the objective's gradient.

        Args:
            clipped: bool, where the gradient was dropped; nowhere by default.
        """
        nowhere = torch.zeros_like(weight, dtype=torch.bool)
        return TokenTerms(weight, -weight * x.advantages * x.logprobs, nowhere if clipped is None else clipped, nowhere)


WeightFunction = Callable[[TokenInputs, PolicyLossConfig], TokenTerms]


@dataclass(frozen=True)
class Objective:
    """An objective: a weight function with the defaults that belong to it.

    Attributes:
        terms: the weight function. Its `config.dual_clip` is a number or None, never "default".
        response_ratio: the ratio of whole responses that `TokenInputs.sequence_ratio` holds: "geometric" is
            exp(mean log r), "clipped geometric" the same after log r of every token was held at `clip_high` for A > 0
            and at -`clip_low` elsewhere, "arithmetic" is the mean of r, None is the token's own r.
        dual_clip: the value of `dual_clip` where the configuration has "default".
    """

    terms: WeightFunction
    response_ratio: Literal["geometric", "clipped geometric", "arithmetic"] | None = None
    dual_clip: float | None = 3.0

    def __call__(self, x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
        return self.terms(x, config)


def aspo(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """ASPO (arXiv 2510.06062): PPO's mask, the ratio flipped for A > 0, and a soft dual clip at c.

    w = 1/r for A > 0 and r for A < 0, at most c. `dual_clip` is c, 3 by default as in the authors' code; the paper
    prints no value. The soft clip holds w at c and keeps the gradient. It acts for A < 0 too, where PPO's dual clip
    drops the gradient of tokens with r > c.
    """
    cap = torch.inf if config.dual_clip is None else float(config.dual_clip)
    positive = x.advantages > 0
    clipped = _outside_clip(x.ratio, x)
    flipped = torch.where(positive, 1 / x.ratio, x.ratio)
    capped = flipped > cap  # never where clipped: there the flipped ratio is below 1
    weight = flipped.clamp(max=cap).masked_fill(clipped, 0.0)

    boundary = torch.where(positive, 1 / (1 + x.clip_high), 1 - x.clip_low)
    value = -x.advantages * torch.where(clipped, boundary, flipped)
    # Above the cap the authors report the loss whose gradient flows there: -w A l.
    value = torch.where(capped, -weight * x.advantages * x.logprobs, value)
    return TokenTerms(weight, value, clipped, capped)


def grpo(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """PPO-clip, as in GRPO and (with clip_high > clip_low) DAPO. `dual_clip` also drops r > c for A < 0."""
    return _ppo_clip(x.ratio, x, config.dual_clip)


def no_is(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """PPO's mask with weight 1: the ASPO paper's ablation without importance sampling."""
    clipped = _outside_clip(x.ratio, x)
    weight = torch.ones_like(x.ratio).masked_fill(clipped, 0.0)
    return TokenTerms.from_weight(x, weight, clipped)


def response_mean_is(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """GRPO with the response's mean ratio for A > 0 (the ASPO paper's Table 4); the mask stays the token's own."""
    ppo = grpo(x, config)
    weight = x.sequence_ratio.masked_fill(ppo.hard_clipped, 0.0)
    return _by_sign(x, TokenTerms.from_weight(x, weight, ppo.hard_clipped), ppo)


def aspo_unmasked(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """ASPO without the mask for A > 0, a control; the cap stays."""
    return aspo(replace(x, clip_high=torch.full_like(x.clip_high, torch.inf)), config)


def no_is_pos(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """`no_is` for A > 0 and `grpo` for A < 0, a control."""
    return _by_sign(x, no_is(x, config), grpo(x, config))


def up(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """UP (arXiv 2607.06987): weight 1 and no mask for A > 0, `grpo` for A < 0."""
    return _by_sign(x, TokenTerms.from_weight(x, torch.ones_like(x.ratio)), grpo(x, config))


def tis(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """Truncated importance sampling: min(r, c) on both signs, without a mask. `dual_clip` is c, 2 by default."""
    cap = torch.inf if config.dual_clip is None else float(config.dual_clip)
    terms = TokenTerms.from_weight(x, x.ratio.clamp(max=cap))
    return replace(terms, soft_clipped=x.ratio > cap)


def cispo(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """CISPO: the clipped ratio as a weight, never masked."""
    weight = torch.clamp(x.ratio, 1 - x.clip_low, 1 + x.clip_high)
    return TokenTerms.from_weight(x, weight, clipped=weight != x.ratio)


def gspo(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """GSPO: PPO-clip on the response's geometric-mean ratio, without a dual clip."""
    return _ppo_clip(x.sequence_ratio, x, dual_clip=None)


def gmpo(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """GMPO: the geometric mean of the response's clipped ratios; clipped tokens have no gradient.

    The clip acts on log r: [-clip_low, clip_high]; the paper has 0.4 for both. The paper's mean over responses is
    `aggregation="seq-mean-token-mean"`.
    """
    clipped = _outside_clip(1 + x.ratio.log(), x)
    weight = x.sequence_ratio.masked_fill(clipped, 0.0)
    return TokenTerms(weight, -x.advantages * x.sequence_ratio, clipped, torch.zeros_like(clipped))


def dppo(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """DPPO, binary TV: min(r, c), without gradient where the token's probability has moved in the advantage's direction
    by more than the clip range.

    `clip_low` and `clip_high` bound pi_old - pi and pi - pi_old (the authors: 0.15), `dual_clip` is c. The binary
    divergence compares the sampled token with all others taken together.
    """
    return _inside_region(x, config, x.logprobs.exp() * (1 - 1 / x.ratio))


def dppo_kl(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """`dppo` with the binary KL(old || current) in place of the total variation (the authors: 0.05)."""
    log_ratio = x.ratio.log()
    old = x.logprobs - log_ratio
    others, old_others = ((-torch.expm1(logprobs)).clamp(min=1e-8) for logprobs in (x.logprobs, old))
    divergence = old_others * (old_others / others).log() - old.exp() * log_ratio
    return _inside_region(x, config, divergence * log_ratio.sign())


def sapo(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    """SAPO: a smooth gate in place of the clip, with value -A (4/tau) sigmoid(tau (r - 1))."""
    tau = torch.full_like(x.ratio, config.sapo_tau_neg).masked_fill(x.advantages > 0, config.sapo_tau_pos)
    gate = torch.sigmoid(tau * (x.ratio - 1))
    nowhere = torch.zeros_like(gate, dtype=torch.bool)
    return TokenTerms(x.ratio * 4 * gate * (1 - gate), -x.advantages * (4 / tau) * gate, nowhere, nowhere)


def _inside_region(x: TokenInputs, config: PolicyLossConfig, moved: Tensor) -> TokenTerms:
    """The terms of `tis`, dropped where `moved`, the signed divergence from the old policy, leaves the clip range."""
    truncated, clipped = tis(x, config), _outside_clip(1 + moved, x)
    terms = TokenTerms.from_weight(x, truncated.weight.masked_fill(clipped, 0.0), clipped)
    return replace(terms, soft_clipped=truncated.soft_clipped & ~clipped)


def _by_sign(x: TokenInputs, positive: TokenTerms, negative: TokenTerms) -> TokenTerms:
    """The terms of `positive` where A > 0, those of `negative` elsewhere."""
    pairs = zip(vars(positive).values(), vars(negative).values(), strict=True)
    return TokenTerms(*(torch.where(x.advantages > 0, first, second) for first, second in pairs))


def _outside_clip(ratio: Tensor, x: TokenInputs) -> Tensor:
    """Where PPO's hard mask drops the gradient: r > 1 + clip_high for A > 0, r < 1 - clip_low for A < 0."""
    too_high = (x.advantages > 0) & (ratio > 1 + x.clip_high)
    too_low = (x.advantages < 0) & (ratio < 1 - x.clip_low)
    return too_high | too_low


def _ppo_clip(ratio: Tensor, x: TokenInputs, dual_clip: Any) -> TokenTerms:
    clipped = _outside_clip(ratio, x)
    value = torch.maximum(-x.advantages * ratio, -x.advantages * torch.clamp(ratio, 1 - x.clip_low, 1 + x.clip_high))
    if dual_clip is not None:
        negative = x.advantages < 0
        clipped = clipped | (negative & (ratio > dual_clip))
        value = torch.where(negative, torch.minimum(value, -dual_clip * x.advantages), value)
    return TokenTerms(ratio.masked_fill(clipped, 0.0), value, clipped, torch.zeros_like(clipped))


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "aspo": Objective(aspo, dual_clip=3.0),
    "grpo": Objective(grpo, dual_clip=None),
    "no_is": Objective(no_is),
    "response_mean_is": Objective(response_mean_is, response_ratio="arithmetic", dual_clip=None),
    "aspo_unmasked": Objective(aspo_unmasked, dual_clip=3.0),
    "no_is_pos": Objective(no_is_pos, dual_clip=None),
    "up": Objective(up, dual_clip=None),
    "tis": Objective(tis, dual_clip=2.0),
    "cispo": Objective(cispo),
    "gspo": Objective(gspo, response_ratio="geometric"),
    "gmpo": Objective(gmpo, response_ratio="clipped geometric"),
    "dppo": Objective(dppo, dual_clip=20.0),
    "dppo_kl": Objective(dppo_kl, dual_clip=20.0),
    "sapo": Objective(sapo),
}


@functools.cache
def find_objective(config: PolicyLossConfig) -> tuple[Objective, PolicyLossConfig]:
    """The configured objective, and the configuration with the objective's own `dual_clip` in place of "default".

    Raises:
        ValueError: `config.objective` cannot be imported.
    """
    record: Any = OBJECTIVES.get(config.objective)  # type: ignore[call-overload]
    if record is None:
        try:
            record = import_object(config.objective, "inputs", "config")
        except UserError as error:
            raise ValueError(f"objective={config.objective}: {error}") from None
    objective = record if isinstance(record, Objective) else Objective(record)
    return objective, replace(config, dual_clip=objective.dual_clip) if config.dual_clip == "default" else config


class ObjectiveError(RunError, ValueError):
    """A user's objective raised an exception, or returned something else than one finite weight per token."""


def token_terms(
    objective: Objective,
    x: TokenInputs,
    config: PolicyLossConfig,
    mask: Tensor | None = None,
    check_finite: bool = True,
) -> TokenTerms:
    """The weights and values that an objective gives to tokens.

    Args:
        objective, config: as `find_objective` returns them.
        mask: bool, the tokens that are trained on; by default all. A user's weights are 0 elsewhere.
        check_finite: whether the weights of a user's objective must be finite; on a GPU the check waits for the device.

    Raises:
        ObjectiveError: a user's objective fails, or does not return one finite weight per token.
    """
    if objective.terms in _BUILT_IN:
        return objective.terms(x, config)
    where = f"objective={config.objective}"
    try:
        terms: Any = objective.terms(x, config)
    except Exception as error:  # whatever the user's function raises
        raise ObjectiveError(f"{where} failed: {type(error).__name__}: {error}") from error
    if not isinstance(terms, TokenTerms):
        raise ObjectiveError(
            f"{where} returned {type(terms).__name__}; return TokenTerms, or TokenTerms.from_weight(x, weight)"
        )
    for name, column in vars(terms).items():
        if not isinstance(column, Tensor) or column.shape != x.ratio.shape:
            raise ObjectiveError(f"{where} returned a {name} that is no tensor of shape {list(x.ratio.shape)}")
    if not terms.weight.is_floating_point():
        raise ObjectiveError(f"{where} returned a weight of {terms.weight.dtype}; it must be floating point")
    if mask is not None:  # a weight may be infinite for the zeros of masked slots
        terms = replace(terms, weight=terms.weight.masked_fill(~mask, 0.0))
    finite = terms.weight.isfinite() if check_finite else None
    if finite is not None and not finite.all():
        at = int((~finite).nonzero()[0, 0])
        raise ObjectiveError(
            f"{where} returned the weight {terms.weight[at].item()} for ratio {x.ratio[at].item():.4g} and advantage "
            f"{x.advantages[at].item():.4g}; weights must be finite"
        )
    return terms


_BUILT_IN = frozenset(objective.terms for objective in OBJECTIVES.values())


def check_objective(config: PolicyLossConfig) -> None:
    """Try the objective on ratios from e^-20 to e^20, with positive, negative and zero advantages.

    Raises:
        UserError: it cannot be imported, fails, or does not return one finite weight per token.
    """
    ratios, advantages = (-20.0, -1.0, -0.1, 0.0, 0.1, 1.0, 20.0), (-1.0, 0.0, 1.0)
    log_ratio, advantage = torch.tensor(list(itertools.product(ratios, advantages))).unbind(1)
    low, high = torch.full_like(log_ratio, config.clip_low), torch.full_like(log_ratio, config.clip_high)
    ratio = log_ratio.exp()
    try:
        objective, config = find_objective(config)
        token_terms(objective, TokenInputs(log_ratio - 21, ratio, advantage, low, high, ratio), config)
    except ValueError as error:
        raise UserError(f"loss.{error}") from None
