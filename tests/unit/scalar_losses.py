"""The table of weights and reported values, token by token in plain Python: the tests' own second opinion."""

import math
from collections.abc import Sequence

Response = Sequence[tuple[float, float, float]]
"""(logprob, old_logprob, advantage) of every token."""


def scalar_terms(
    objective: str,
    response: Response,
    low: Sequence[float],
    high: Sequence[float],
    c: float | None,
    tau: tuple[float, float] = (1.0, 1.05),
) -> list[tuple[float, float]]:
    """(weight, reported value) of every token of one response; `low`, `high`: the tokens' clip ranges."""
    ratios = [math.exp(min(20.0, max(-20.0, logprob - old))) for logprob, old, _ in response]
    mean_ratio = sum(ratios) / len(ratios)
    mean_log_ratio = sum(logprob - old for logprob, old, _ in response) / len(response)
    sequence_ratio = math.exp(min(10.0, mean_log_ratio))
    terms: list[tuple[float, float]] = []
    for (logprob, _, advantage), r, lo, hi in zip(response, ratios, low, high, strict=True):
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
            case "cispo":
                w = min(max(r, 1 - lo), 1 + hi)
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


def _ppo(r: float, advantage: float, low: float, high: float, c: float | None) -> tuple[float, float]:
    clipped = min(max(r, 1 - low), 1 + high)
    value = max(-advantage * r, -advantage * clipped)
    kept = _inside(r, advantage, low, high)
    if c is not None and advantage < 0:
        value = min(value, -c * advantage)
        kept = kept and r <= c
    return r * kept, value


def _aspo(logprob: float, r: float, advantage: float, low: float, high: float, c: float) -> tuple[float, float]:
    """The second table of the specification, row by row."""
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
    """Linearly interpolated between order statistics."""
    ordered = sorted(values)
    rank = q * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])
