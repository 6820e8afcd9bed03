"""Contrasts of the study that no claim has, and counts of collapsed runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from packed import Metrics
from paired import interval
from study_metrics import metrics
from unplanned import contrasts, findings

RATES = (1.5e-4, 5e-4)
ARMS = ("grpo", "aspo", "up", "no_is_pos", "aspo_unmasked", "aspo_no_cap")
SEEDS = (101, 102, 103)


def fresh(arm: str, lr: float, seed: int) -> Metrics:
    """A run of A. Its pass@1 is 0.4 or 0.3, by the rate, and 0.01 more for every arm before it in the list and seed."""
    score = (0.4 if lr == RATES[0] else 0.3) + 0.01 * ARMS.index(arm) * (seed - 100)
    columns = {"loss/entropy": np.full(10, score / 2), "reward/mean": np.ones(10)}
    return metrics(columns, {"eval/accuracy": score}, arm=arm, lr=lr, seed=seed)


def stale(arm: str, seed: int, reward: float, score: float) -> Metrics:
    return metrics({"reward/mean": np.full(20, reward)}, {"eval/accuracy": score}, block="C", arm=arm, k=4, seed=seed)


def test_contrasts_are_paired_differences_with_intervals() -> None:
    runs = {run.key: run for run in (fresh(arm, lr, seed) for arm in ARMS for lr in RATES for seed in SEEDS)}
    table = contrasts(runs, runs)
    middle, low, high = interval(np.array([0.02, 0.04, 0.06]))  # two places in the list, by seed
    assert middle == pytest.approx(0.04)
    up = f"{middle:+.3g} [{low:+.3g}, {high:+.3g}]"
    assert f"| up less grpo | pass@1 | {up} | {up} |" in table
    half = f"{middle / 2:+.3g} [{low / 2:+.3g}, {high / 2:+.3g}]"
    assert f"| up less grpo | entropy | {half} | {half} |" in table
    assert "| grpo | +0.1 [+0.1, +0.1] |" in table
    said = findings(runs, runs)
    assert "loses 0.10 to 0.10 of pass@1." in said
    assert "There aspo_no_cap is the best of 6 arms: GRPO's pass@1 +0.1 [" in said
    lacking = dict(list(runs.items())[1:])
    assert contrasts(runs, lacking) == "Not all runs of A are there."
    assert findings(runs, lacking) == "Nothing yet."


def test_collapsed_runs_are_counted_by_arm_and_others_that_failed_are_named() -> None:
    made = [stale("inert", seed, 0.0, 0.0) for seed in SEEDS]
    made += [stale("tis", 101, 0.0, 0.0), stale("tis", 102, 0.1, 0.001), stale("tis", 103, 0.3, 0.3)]
    made += [stale("grpo", seed, 0.4, 0.4) for seed in SEEDS]
    made.append(dataclasses.replace(stale("inert", 101, 0.0, 0.0), key=dataclasses.replace(made[0].key, k=0)))
    runs = {run.key: run for run in made}
    assert findings(runs, runs) == (
        "- Stale runs that collapsed: inert 3 of 3, tis 1 of 3 (1 more below pass@1 0.01), other arms none."
    )
