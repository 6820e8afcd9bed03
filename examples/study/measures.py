"""Quantities that the claims compare: a number of a run, from its metrics over a window of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from packed import Metrics

Measure = Callable[[Metrics], float]

COLLAPSED = 0.02
"""Mean reward of the last ten steps below which a run has collapsed. A run that an error ended has collapsed, too."""


def window(run: Metrics, metric: str, first: float = 0.0, last: float = 1.0) -> NDArray[np.float64]:
    """Return the metric's values at steps in (first, last] x the run's steps.

    A step without updates lacks some metrics. If the whole window lacks the metric, its last earlier value stands: the
    policy has not changed since. NaN if the run never had it.
    """
    values = run.train.get(metric, np.full(len(run.train["step"]), math.nan))
    steps = run.train["step"]
    inside = values[(steps > first * run.steps) & (steps <= last * run.steps)]
    known = inside[~np.isnan(inside)]
    if len(known):
        return known
    earlier = values[(steps <= last * run.steps) & ~np.isnan(values)]
    return earlier[-1:] if len(earlier) else np.array([math.nan])


def mean(metric: str, first: float = 0.0, last: float = 1.0) -> Measure:
    return lambda run: float(window(run, metric, first, last).mean())


def end(metric: str) -> Measure:
    """Mean over the last fifth of the steps."""
    return mean(metric, 0.8)


def held_out(metric: str) -> Measure:
    """Value of the evaluation after the last step; 0 if an error ended the run before."""
    return lambda run: 0.0 if run.error else float(run.evaluation[f"eval/{metric}"][-1])


def log10(measure: Measure) -> Measure:
    return lambda run: math.log10(max(measure(run), 1e-9))


def repeated_attempts(run: Metrics) -> float:
    """Share of retries in the last fifth that equal an earlier attempt; 0 without retries."""
    retries = end("rollout/retries")(run)
    return end("rollout/repeats")(run) / retries if retries else 0.0


def typical_kl(run: Metrics) -> float:
    """Median over the last fifth of the steps: one token can raise the mean of a step a hundredfold."""
    return float(np.median(window(run, "loss/kl", 0.8)))


def clip_fraction(run: Metrics) -> float:
    """Clip fraction over all steps, both signs of the advantage with equal weight."""
    return (mean("loss/clip_fraction_pos")(run) + mean("loss/clip_fraction_neg")(run)) / 2


def ratio_gap_first(run: Metrics) -> float:
    """Mean r of tokens with A > 0 less that with A < 0, in the first pass over each batch."""
    return mean("loss/ratio_pos_first_epoch")(run) - mean("loss/ratio_neg_first_epoch")(run)


def ratio_gap_later(run: Metrics) -> float:
    """Mean r of tokens with A > 0 less that with A < 0, in the later passes: all of E passes hold the same tokens."""
    every = mean("loss/ratio_pos")(run) - mean("loss/ratio_neg")(run)
    return (run.epochs * every - ratio_gap_first(run)) / (run.epochs - 1)


def largest_norm(run: Metrics) -> float:
    return float(window(run, "optimizer/grad_norm_max").max())


def norm_percentile(run: Metrics) -> float:
    return float(np.percentile(window(run, "optimizer/grad_norm_max"), 99))


def collapsed(run: Metrics) -> float:
    return float(run.error is not None or run.train["reward/mean"][-10:].mean() < COLLAPSED)


MEASURES: dict[str, Measure] = {
    "pass@1": held_out("accuracy"),
    "pass@16": held_out("pass_at_16"),
    "early reward": mean("reward/mean", 0.0, 0.25),
    "final reward": end("reward/mean"),
    "entropy": end("loss/entropy"),
    "repeated attempts": repeated_attempts,
    "repeated 4-grams": end("rollout/repetition"),
    "log10 KL": log10(typical_kl),
    "clip fraction": clip_fraction,
    "ratio gap, epoch 1": ratio_gap_first,
    "ratio gap, later epochs": ratio_gap_later,
    "log10 largest gradient norm": log10(largest_norm),
    "log10 p99 of gradient norms": log10(norm_percentile),
    "collapse": collapsed,
}
"""Measures by name. KL and gradient norms are heavy-tailed: logarithms are compared."""

EQUAL_REWARD = "entropy at equal reward"


def entropy_at_equal_reward(runs: Sequence[Metrics]) -> list[float]:
    """Return each run's entropy at the middle of the rewards that all runs have had; NaN if they have none in common.

    Rewards and entropies are means over a fifth of the steps, straight lines between these. A run's entropy is the mean
    of its entropies wherever its reward crosses the level.
    """
    paths: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for run in runs:
        width = max(1, run.steps // 5)
        reward, entropy = (
            np.convolve(filled(run.train[name]), np.full(width, 1 / width), "valid").astype(np.float64)
            for name in ("reward/mean", "loss/entropy")
        )
        paths.append((reward, entropy))
    low, high = max(reward.min() for reward, _ in paths), min(reward.max() for reward, _ in paths)
    if low > high:
        return [math.nan] * len(runs)
    return [_at(reward, entropy, (low + high) / 2) for reward, entropy in paths]


def _at(reward: NDArray[np.float64], entropy: NDArray[np.float64], level: float) -> float:
    above = reward - level
    crossed = np.flatnonzero(above[:-1] * above[1:] <= 0)
    if not len(crossed):  # a run of one span
        return float(entropy[0])
    step = above[crossed] - above[crossed + 1]
    # Between two equal rewards, both at the level, the middle is taken.
    share = np.divide(above[crossed], step, out=np.full(len(crossed), 0.5), where=step != 0)
    return float((entropy[crossed] * (1 - share) + entropy[crossed + 1] * share).mean())


def filled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the values with each missing one replaced by the last known one before it, or else the first known one."""
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return values
    return values[known[np.maximum(np.searchsorted(known, np.arange(len(values)), "right") - 1, 0)]]
