"""Power of the planned seeds, from the pilot runs (seeds up to 100), which no verdict counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from claims import Claim, Comparison, Runs, comparisons, contrasts_of, reduce
from design import PILOTS, Key
from paired import Numbers, holm, student_quantile

FEWEST = 3
"""Pilot seeds that a standard deviation needs."""
DRAWS = 20_000


def pilot_contrasts(test: Comparison, runs: Runs) -> Numbers:
    """Return the contrasts of the pilot seeds that have all runs of the test."""
    keys: list[Key] = test.keys(0)
    seeds = sorted({key.seed for key in runs if key.block == keys[0].block and key.seed in PILOTS})
    contrasts = [reduce(test, by_arm) for by_arm in contrasts_of(test, runs, seeds).values()]
    return np.array([contrast for contrast in contrasts if not math.isnan(contrast)])


def simulated_studies(test: Comparison, pilots: Numbers, rng: np.random.Generator) -> tuple[Numbers, Numbers]:
    """Return the p-values of "reproduced" and of "opposite" in `DRAWS` simulated studies.

    Contrasts are normal with the pilots' standard deviation, around the pilots' mean or, where equality is expected,
    around 0. Collapses are drawn from the pilots with replacement.
    """
    claim = test.claim
    shape = (DRAWS, len(claim.seeds))
    if claim.metric == "collapse":
        d = rng.choice(pilots, shape)
    else:
        d = rng.normal(0 if claim.expect == "equal" else pilots.mean(), pilots.std(ddof=1), shape)
    return test.p_values(d)


def resolution(test: Comparison, sd: float, n: int, alpha: float) -> float:
    """Return what `n` seeds resolve with 80 % power, for contrasts with standard deviation `sd`.

    The smallest true effect, in addition to the claim's `beyond`; where equality is expected the narrowest margin.
    """
    test_side, power_side = (1 - alpha, 0.9) if test.claim.expect == "equal" else (1 - alpha / 2, 0.8)
    return (student_quantile(test_side, n - 1) + student_quantile(power_side, n - 1)) * sd / math.sqrt(n)


def power_table(runs: Runs, claims: Sequence[Claim], alpha: float) -> str:
    """Return a line per test: the chance that the planned seeds reproduce the claim, and what they resolve.

    Tests of the primary family are adjusted together, as if they were independent. Those without pilots count as p = 1.
    """
    tests = comparisons(claims)
    pilots = {test: pilot_contrasts(test, runs) for test in tests}
    rng = np.random.default_rng(0)
    simulated = {test: simulated_studies(test, d, rng) for test, d in pilots.items() if len(d) >= FEWEST}
    family = [test for test in tests if test.primary]
    none = np.ones(DRAWS)
    smaller = [np.minimum(*simulated[test]) if test in simulated else none for test in family]
    adjusted = holm(np.stack(smaller, -1))
    lines = [f"{'claim':54} {'lr':>8} {'k':>8} pilots {'mean':>9} {'SD':>8} seeds {'power':>6} {'resolves':>9}"]
    for test in tests:
        claim, d = test.claim, pilots[test]
        label = f"{claim.id}{'*' if test.primary else ''} {'-'.join(claim.arms)} {claim.metric}"
        lr = "best" if test.lr == "best" else f"{test.lr:g}"
        head = f"{label:54.54} {lr:>8} {','.join(map(str, test.ks)):>8} {len(d):6d}"
        if test not in simulated:
            lines.append(f"{head}  too few pilots")
            continue
        p, opposite = simulated[test]
        reproduced = p <= opposite
        if test.primary:
            p = adjusted[:, family.index(test)]
        n, sd = len(claim.seeds), d.std(ddof=1)
        chance = float(((p <= alpha) & reproduced).mean())
        lines.append(f"{head} {d.mean():+9.4f} {sd:8.4f} {n:5d} {chance:6.2f} {resolution(test, sd, n, alpha):9.4f}")
    return "\n".join([*lines, "* with Holm's correction"])
