"""Settings of the policy loss; needs the standard library alone."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from megatron_aspo.config.rules import require, require_known

ControlName = Literal["aspo_unmasked", "no_is_pos", "up", "tis"]
"""Objectives that part the effects of ASPO's weight, mask and cap."""

ObjectiveName = Literal[
    "aspo", "grpo", "no_is", "response_mean_is", ControlName, "cispo", "gspo", "gmpo", "dppo", "dppo_kl", "sapo"
]
"""The built-in objectives: the keys of `OBJECTIVES` in `megatron_aspo.loss.objectives`."""

WITHOUT_CAP = ("no_is", "cispo", "gspo", "gmpo", "sapo")
"""Objectives without a dual clip."""

WITHOUT_RANGE = ("tis", "sapo")
"""Objectives without a clip range."""

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


@dataclass(frozen=True)
class PolicyLossConfig:
    """The policy loss. DAPO is `grpo` with `clip_high=0.28`; dual-clip PPO is `grpo` with `dual_clip=3`."""

    objective: str = "aspo"
    """Weight function of the importance ratio, which multiplies the advantage: an `ObjectiveName`, or the import path
    `module:name` of a function or an `Objective` record (docs/extending.md)."""
    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high], for gmpo its logarithm to [-clip_low, clip_high]; dppo
    bounds the divergence by both."""
    clip_high: float = 0.2
    """See `clip_low`."""
    dual_clip: float | Literal["default"] | None = "default"
    """Cap c of the (soft) dual clip, > 1; None turns it off. "default" takes the objective's own: 3 for aspo and
    aspo_unmasked, 2 for tis, 20 for dppo and dppo_kl, none for grpo, response_mean_is, no_is_pos and up. The others
    have no dual clip."""
    entropy_quantile: float | None = None
    """With a value q, tokens whose entropy exceeds the q-quantile of their response use `high_entropy_clip` on both
    sides (the Archer2.0 recipe: 0.8 and 0.4)."""
    high_entropy_clip: float = 0.4
    """`clip_low` and `clip_high` of these tokens."""
    aggregation: Aggregation = "token-mean"
    """How per-token losses become one number. `seq-mean-token-sum-norm` divides every response's sum by the constant
    `norm_length` (Dr. GRPO)."""
    norm_length: int | None = None
    """Tokens, for that aggregation alone. In a run, null takes `rollout.max_response_tokens`."""
    sapo_tau_pos: float = 1.0
    """Temperature of SAPO's gate for positive advantages."""
    sapo_tau_neg: float = 1.05
    """Temperature of SAPO's gate for negative advantages."""
    kl_coef: float = 0.0
    """Coefficient of KL(policy || reference); needs `ref_logprobs`."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL."""
    kl_tokens: Literal["all", "low_entropy"] = "all"
    """"low_entropy" restricts the KL term to tokens at or below the `entropy_quantile` of their response, so that
    high-entropy tokens are free (Archer, arXiv 2507.15778)."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus; needs `entropy`."""
    anchor: Literal["trainer", "rollout"] = "trainer"
    """Denominator of the importance ratio r: "trainer" is pi_old, by the trainer's weights at the start of the step;
    "rollout" is pi_rollout, the sampler's log-probs, and no pass computes pi_old. It leaves no rho to correct."""
    anchor_band: tuple[float, float] | None = None
    """With anchor "rollout": tokens whose r lies outside [low, high] get no policy gradient, whatever the sign of the
    advantage, because 1/r of a numerical mismatch must not be amplified."""
    rollout_correction: Literal["none", "truncate", "mask"] = "none"
    """Weight of the policy gradient by rho = pi_old / pi_rollout, the mismatch between trainer and sampler: "truncate"
    (TIS) by min(rho, rollout_ratio_high), "mask" (MIS, IcePop) by rho inside [rollout_ratio_low, rollout_ratio_high]
    and by 0 outside."""
    rollout_ratio_low: float = 0.5
    """Lower bound of rho."""
    rollout_ratio_high: float = 2.0
    """Upper bound of rho."""
    rollout_sequence_low: float | None = None
    """Responses whose geometric-mean rho is lower are dropped."""
    rollout_sequence_high: float | None = None
    """Responses whose geometric-mean rho is higher are dropped."""
    rollout_veto: float | None = None
    """Responses with a token whose rho is lower are dropped."""

    def __post_init__(self) -> None:
        require_known("objective", self.objective, typing.get_args(ObjectiveName))
        for name in ("aggregation", "kl_estimator", "kl_tokens", "anchor", "rollout_correction"):
            allowed = typing.get_args(typing.get_type_hints(PolicyLossConfig)[name])
            value = getattr(self, name)
            require(value in allowed, f"{name}={value!r} is not one of {', '.join(allowed)}")
        band = _as_pair(self.anchor_band)
        if band:
            object.__setattr__(self, "anchor_band", band)  # frozen; a list could not be hashed
        low, high = self.rollout_sequence_band
        ratio_low, ratio_high = self.rollout_ratio_low, self.rollout_ratio_high
        cap = None if self.dual_clip == "default" else self.dual_clip
        quantile, length, veto = self.entropy_quantile, self.norm_length, self.rollout_veto
        for name, is_valid, rule in (
            ("clip_low", 0 <= self.clip_low < 1, "must lie in [0, 1)"),
            ("clip_high", 0 <= self.clip_high < math.inf, "must be finite and >= 0"),
            ("dual_clip", cap is None or (not isinstance(cap, str) and cap > 1), "must be > 1, null or default"),
            ("entropy_quantile", quantile is None or 0 <= quantile <= 1, "must lie in [0, 1]"),
            ("high_entropy_clip", 0 <= self.high_entropy_clip < 1, "must lie in [0, 1)"),
            ("sapo_tau_pos", self.sapo_tau_pos > 0, "must be > 0"),
            ("sapo_tau_neg", self.sapo_tau_neg > 0, "must be > 0"),
            ("kl_coef", 0 <= self.kl_coef < math.inf, "must be finite and >= 0"),
            ("kl_tokens", self.kl_tokens == "all" or quantile is not None, "needs entropy_quantile (Archer: 0.8)"),
            ("entropy_coef", math.isfinite(self.entropy_coef), "must be finite"),
            (
                "anchor_band",
                self.anchor_band is None or (band is not None and 0 <= band[0] < 1 < band[1] < math.inf),
                "must be [low, high] with 0 <= low < 1 < high, or null",
            ),
            ("anchor_band", self.anchor == "rollout" or self.anchor_band is None, "needs anchor=rollout"),
            ("norm_length", length is None or 0 < length < math.inf, "must be finite and > 0"),
            ("rollout_ratio_low", 0 <= ratio_low < ratio_high, f"must lie in [0, rollout_ratio_high={ratio_high})"),
            ("rollout_ratio_high", ratio_high < math.inf, "must be finite"),
            (
                "rollout_sequence_low",
                0 <= low < high,
                f"must lie in [0, rollout_sequence_high={self.rollout_sequence_high})",
            ),
            ("rollout_veto", veto is None or 0 < veto < 1, "must lie in (0, 1)"),
        ):
            require(is_valid, f"{name}={getattr(self, name)} {rule}")
        for name in ("rollout_correction", "rollout_sequence_low", "rollout_sequence_high", "rollout_veto"):
            value = getattr(self, name)
            require(
                self.anchor == "trainer" or value in ("none", None),
                f"{name}={value} acts on pi_old / pi_rollout, but with anchor=rollout no pass computes pi_old; "
                "remove it and set anchor_band, such as [0.2, 5]",
            )

    @property
    def without_effect(self) -> list[str]:
        """A line for each setting that changes nothing because of another."""
        unused = {
            "dual_clip": self.objective in WITHOUT_CAP and self.dual_clip not in ("default", None),
            "entropy_quantile": self.objective in WITHOUT_RANGE
            and self.entropy_quantile is not None
            and self.kl_tokens == "all",
        }
        reasons = {name: f"objective={self.objective}" for name, is_unused in unused.items() if is_unused}
        if self.kl_tokens != "all" and not self.kl_coef:
            reasons["kl_tokens"] = "kl_coef=0"
        for name, modes in (("rollout_ratio_low", ("mask",)), ("rollout_ratio_high", ("mask", "truncate"))):
            default = PolicyLossConfig.__dataclass_fields__[name].default
            if getattr(self, name) != default and self.rollout_correction not in modes:
                reasons[name] = f"rollout_correction={self.rollout_correction}"
        return [f"{name}={getattr(self, name)} has no effect with {reason}" for name, reason in reasons.items()]

    @property
    def rollout_sequence_band(self) -> tuple[float, float]:
        """The band of a response's geometric-mean rho, open ends filled in."""
        low, high = self.rollout_sequence_low, self.rollout_sequence_high
        return 0.0 if low is None else low, math.inf if high is None else high

    @property
    def drops_responses(self) -> bool:
        """Whether whole responses can be dropped for their mismatch with the sampler."""
        return self.rollout_sequence_band != (0.0, math.inf) or self.rollout_veto is not None

    @property
    def corrects_rollout(self) -> bool:
        """Whether rho = pi_old / pi_rollout enters the gradient."""
        return self.rollout_correction != "none" or self.drops_responses


def _as_pair(value: Any) -> tuple[float, float] | None:
    """Two numbers as a tuple; None for anything else."""
    try:
        low, high = value
    except (TypeError, ValueError):
        return None
    return low, high
