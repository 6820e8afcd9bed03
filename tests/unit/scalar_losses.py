"""Independent reference for the tests: the table of weights and reported values, token by token in plain Python."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.loss import LossOutput, policy_loss

Response = Sequence[tuple[float, float, float]]
"""(logprob, old_logprob, advantage) of every token."""


def scalar_terms(
    objective: str,
    response: Response,
    low: Sequence[float],
    high: Sequence[float],
    c: float | None,
    tau: tuple[float, float] = (1.0, 1.05),
    band: tuple[float, float] | None = None,
) -> list[tuple[float, float]]:
    """(weight, reported value) of every token of one response; `low`, `high`: the tokens' clip ranges. Tokens outside
    the `band` do not count in the response's ratio."""
    ratios = [math.exp(min(20.0, max(-20.0, logprob - old))) for logprob, old, _ in response]
    least, most = band or (0.0, math.inf)
    counted = [least <= r <= most for r in ratios]

    def mean(values: Sequence[float], empty: float) -> float:
        kept = list(itertools.compress(values, counted))
        return sum(kept) / len(kept) if kept else empty

    mean_ratio = mean(ratios, 1.0)
    sequence_ratio = math.exp(min(10.0, mean([logprob - old for logprob, old, _ in response], 0.0)))
    terms: list[tuple[float, float]] = []
    clipped = [
        min(logprob - old, hi) if advantage > 0 else max(logprob - old, -lo)
        for (logprob, old, advantage), lo, hi in zip(response, low, high, strict=True)
    ]
    clipped_ratio = math.exp(min(10.0, mean(clipped, 0.0)))
    for (logprob, old, advantage), r, lo, hi in zip(response, ratios, low, high, strict=True):
        match objective:
            case "aspo":
                terms.append(_aspo(logprob, r, advantage, lo, hi, math.inf if c is None else c))
            case "grpo":
                terms.append(_ppo(r, advantage, lo, hi, c))
            case "gspo":
                terms.append(_ppo(sequence_ratio, advantage, lo, hi, None))
            case "no_is":
                w = float(_inside(r, advantage, lo, hi))
                terms.append((w, -w * advantage * logprob))
            case "response_mean_is" if advantage > 0:
                w = mean_ratio * _inside(r, advantage, lo, hi)
                terms.append((w, -w * advantage * logprob))
            case "response_mean_is":
                terms.append(_ppo(r, advantage, lo, hi, c))
            case "aspo_unmasked":
                hi = math.inf if advantage > 0 else hi
                terms.append(_aspo(logprob, r, advantage, lo, hi, math.inf if c is None else c))
            case "no_is_pos" | "up" if advantage > 0:
                w = 1.0 if objective == "up" or r <= 1 + hi else 0.0
                terms.append((w, -w * advantage * logprob))
            case "no_is_pos" | "up":
                terms.append(_ppo(r, advantage, lo, hi, c))
            case "tis":
                w = r if c is None else min(r, c)
                terms.append((w, -w * advantage * logprob))
            case "cispo":
                w = min(max(r, 1 - lo), 1 + hi)
                terms.append((w, -w * advantage * logprob))
            case "gmpo":
                inside = -lo <= logprob - old or advantage > 0, logprob - old <= hi or advantage <= 0
                terms.append((clipped_ratio * all(inside), -advantage * clipped_ratio))
            case "dppo" | "dppo_kl":
                w = r if c is None else min(r, c)
                moved = _moved(objective, logprob, math.log(r))
                w *= not (advantage > 0 and moved > hi) and not (advantage < 0 and moved < -lo)
                terms.append((w, -w * advantage * logprob))
            case "sapo":
                t = tau[0] if advantage > 0 else tau[1]
                gate = _sigmoid(t * (r - 1))
                terms.append((r * 4 * gate * (1 - gate), -advantage * 4 / t * gate))
            case _:
                raise AssertionError(objective)
    return terms


def _inside(r: float, advantage: float, low: float, high: float) -> bool:
    if advantage > 0:
        return r <= 1 + high
    return advantage == 0 or r >= 1 - low


def _moved(objective: str, logprob: float, log_ratio: float) -> float:
    """The binary divergence of the old policy from the current one, signed as the change of the probability."""
    p, q = math.exp(logprob), math.exp(logprob - log_ratio)
    if objective == "dppo":
        return p - q
    kl = q * math.log(q / p) + max(1 - q, 1e-8) * math.log(max(1 - q, 1e-8) / max(1 - p, 1e-8))
    return kl * math.copysign(1.0, log_ratio)


def _ppo(r: float, advantage: float, low: float, high: float, c: float | None) -> tuple[float, float]:
    clipped = min(max(r, 1 - low), 1 + high)
    value = max(-advantage * r, -advantage * clipped)
    kept = _inside(r, advantage, low, high)
    if c is not None and advantage < 0:
        value = min(value, -c * advantage)
        kept = kept and r <= c
    return r * kept, value


def _aspo(logprob: float, r: float, advantage: float, low: float, high: float, c: float) -> tuple[float, float]:
    """Second table of the specification, row by row."""
    size = abs(advantage)
    if advantage > 0:
        if r > 1 + high:
            return 0.0, -advantage / (1 + high)
        if r < 1 / c:
            return c, -c * advantage * logprob
        return 1 / r, -advantage / r
    if advantage < 0:
        if r < 1 - low:
            return 0.0, size * (1 - low)
        if r > c:
            return c, c * size * logprob
        return r, size * r
    return 1.0, 0.0  # any weight: it is multiplied by the advantage


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def scalar_quantile(values: Sequence[float], q: float) -> float:
    """Quantile by linear interpolation between order statistics."""
    ordered = sorted(values)
    rank = q * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def response_terms(
    config: PolicyLossConfig, response: Response, entropy: Sequence[float] = ()
) -> list[tuple[float, float]]:
    """`scalar_terms` of one response, with the configuration's clip ranges, dual clip and band."""
    low, high = [config.clip_low] * len(response), [config.clip_high] * len(response)
    if config.entropy_quantile is not None and response:
        limit = scalar_quantile(entropy, config.entropy_quantile)
        low = [config.high_entropy_clip if e > limit else config.clip_low for e in entropy]
        high = [config.high_entropy_clip if e > limit else config.clip_high for e in entropy]
    cap = config.dual_clip
    if cap == "default":
        cap = {"aspo": 3.0, "aspo_unmasked": 3.0, "tis": 2.0, "dppo": 20.0, "dppo_kl": 20.0}.get(config.objective)
    return scalar_terms(config.objective, response, low, high, cap, band=config.anchor_band) if response else []


def rollout_factors(rhos: Sequence[float], config: PolicyLossConfig) -> tuple[list[float], list[bool], bool]:
    """The correction of the tokens of one response with these pi_old / pi_rollout: (factors, cut, dropped)."""
    low, high = config.rollout_sequence_low, config.rollout_sequence_high
    mean = math.exp(sum(map(math.log, rhos)) / len(rhos))
    dropped = (low is not None and mean < low) or (high is not None and mean > high)
    dropped = dropped or (config.rollout_veto is not None and min(rhos) < config.rollout_veto)
    factors, cut = [1.0] * len(rhos), [False] * len(rhos)
    if config.rollout_correction == "truncate":
        factors, cut = [min(r, config.rollout_ratio_high) for r in rhos], [r > config.rollout_ratio_high for r in rhos]
    elif config.rollout_correction == "mask":
        cut = [not config.rollout_ratio_low <= r <= config.rollout_ratio_high for r in rhos]
        factors = [0.0 if c else r for r, c in zip(rhos, cut, strict=True)]
    return [0.0 if dropped else f for f in factors], cut, dropped


def differentiate(inputs: dict[str, Any], config: PolicyLossConfig) -> tuple[LossOutput, Any, Any]:
    """The loss of `policy_loss`, and the gradients of its sum with respect to log-probs and entropy."""
    given = [name for name in ("logprobs", "entropy") if inputs.get(name) is not None]
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in given}
    out = policy_loss(**inputs | leaves, config=config)
    out.loss_sum.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    assert gradients["logprobs"] is not None
    return out, gradients["logprobs"], gradients.get("entropy")


def numbers(metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[float, float]]:
    return {name: (float(total), float(count)) for name, (total, count) in metrics.items()}
