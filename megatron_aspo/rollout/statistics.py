"""Means, standard errors and 95 % intervals of rewards, accuracies and pass@k."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Coverage of every interval."""

NORMAL_QUANTILE = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def standard_error(means: Sequence[float]) -> float | None:
    """Standard error of the mean of `means`, one mean per prompt; None for a single prompt.

    Responses to one prompt are correlated, so the prompts are the independent observations.
    """
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def proportion_interval(mean: float, count: float, quantile: float = NORMAL_QUANTILE) -> tuple[float, float]:
    """Interval of a proportion over `count` independent observations, by Agresti and Coull (Am. Stat. 52, 1998), with
    `quantile` standard errors on either side."""
    centre = (mean * count + quantile**2 / 2) / (count + quantile**2)
    half = quantile * math.sqrt(centre * (1 - centre) / (count + quantile**2))
    return min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))


def difference_interval(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Interval of `second` - `first`, each (proportion, count), from independent observations.

    The square-and-add method of Newcombe (Stat. Med. 17, 1998, method 10) on `proportion_interval`.
    """
    (p, _), (q, _) = second, first
    (low_p, high_p), (low_q, high_q) = proportion_interval(*second), proportion_interval(*first)
    return (p - q - math.hypot(p - low_p, high_q - q), p - q + math.hypot(high_p - p, q - low_q))


def mean_with_interval(values: Sequence[float]) -> Estimate:
    """The mean of `values` in [0, 1], one per problem, as an estimate for all problems of the kind.

    Problems are the independent observations: responses to one problem are correlated, and only their mean enters. The
    interval is `proportion_interval` with Student's quantile for an effective number of problems, n / D. The design
    effect D = variance of the values / m(1 - m) is 1 where every problem is either solved or not, and smaller where
    values lie between. Few problems of which hardly any was solved mostly underestimate the variance. Therefore D
    counts half a solved and half a failed problem more than observed, and is at most 1.

    Raises:
        ValueError: no values, or a value outside [0, 1].
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(x) or x.min() < 0 or x.max() > 1:
        raise ValueError("values must be numbers in [0, 1], at least one")
    n, mean = len(x), float(x.mean())
    if n == 1:
        return Estimate(mean, 0.0, 1.0)
    padded = (x.sum() + 0.5) / (n + 1)
    squares = ((x - padded) ** 2).sum() + 0.5 * padded**2 + 0.5 * (1 - padded) ** 2
    design_effect = min(1.0, squares / n / (padded * (1 - padded)))
    return Estimate(mean, *proportion_interval(mean, n / design_effect, _student_quantile(n - 1)))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k responses is right, from `samples` with `correct` right ones:
    1 - C(samples - correct, k) / C(samples, k) (Chen et al., arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: k is outside [1, samples], or `correct` outside [0, samples].
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must lie in [1, samples={samples}]")
    if not 0 <= correct <= samples:
        raise ValueError(f"correct={correct} must lie in [0, samples={samples}]")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


@functools.cache
def _student_quantile(degrees: int) -> float:
    """t for which Student's distribution with `degrees` degrees of freedom has probability `LEVEL` in [-t, t]."""
    # With t = sqrt(degrees) tan(u) the density in u is cos(u)^(degrees - 1), without tails.
    u = np.linspace(0.0, math.pi / 2, 100_001)
    density = np.cos(u) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(degrees) * math.tan(float(np.interp(LEVEL, below / below[-1], u)))
