"""The study's tests: p-values equal published or independent ones, and error rates are nominal on null data."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import mpmath
import numpy as np
import pytest
from claims import ALPHA, Claim, Comparison, Judged, comparisons, judge_all, load_claims
from design import Key
from packed import Metrics
from paired import Numbers, holm, interval, sign_test, student_quantile, student_tail, tost, two_sided
from planning import resolution, simulated_studies

DRAWS = 20_000
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
"""Hours of sleep gained, Student (1908), the example of R's t.test: t = 4.0621, p = 0.002833."""


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 7, 11, 12, 30])
def test_students_t_equals_the_incomplete_beta_function(df: int) -> None:
    for t in (0.0, 1e-3, 0.7, 2.0, 8.0, 40.0):
        with mpmath.workdps(40):
            x = mpmath.mpf(df) / (df + mpmath.mpf(t) ** 2)
            expected = float(mpmath.betainc(mpmath.mpf(df) / 2, 0.5, 0, x, regularized=True) / 2)
        assert student_tail([t, -t], df) == pytest.approx([expected, 1 - expected], rel=0, abs=1e-14)


def test_quantiles_equal_the_published_table() -> None:
    table = {1: 12.706, 2: 4.303, 5: 2.571, 11: 2.201, 30: 2.042}
    assert [student_quantile(0.975, df) for df in table] == pytest.approx(list(table.values()), abs=5e-4)


def test_paired_t_test_of_students_data() -> None:
    assert two_sided(SLEEP) == pytest.approx(0.002833, abs=5e-7)
    assert np.array(interval(SLEEP)) == pytest.approx([1.58, 0.7001142, 2.4598858], abs=1e-7)


def test_equivalence_is_the_90_percent_interval_within_the_margin() -> None:
    _, low, high = interval(SLEEP, 0.90)
    for margin in (float(high) + 1e-6, float(high) - 1e-6):
        assert (tost(SLEEP, margin) <= 0.05) == (-margin <= low and high <= margin)


def test_data_without_spread() -> None:
    """Equal numbers are no evidence of a difference from themselves, and full evidence against any other mean."""
    flat = np.full((3, 8), [[0.0], [0.1], [-0.1]])
    assert two_sided(flat).tolist() == [1, 0, 0]
    assert tost(flat, 0.05).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("above", "below", "equal", "p"),
    [(8, 0, 0, 2 / 256), (7, 0, 1, 2 / 128), (9, 2, 1, 2 * (1 + 11 + 55) / 2048), (0, 0, 8, 1), (3, 3, 2, 1)],
)
def test_exact_sign_test(above: int, below: int, equal: int, p: float) -> None:
    assert sign_test([1.0] * above + [-1.0] * below + [0.0] * equal) == pytest.approx(p)


def test_holms_adjusted_p_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([[0.9, 0.6], [0.02, 0.5]]) == pytest.approx(np.array([[1, 1], [0.04, 0.5]]))


# Error rates


PILOT_SD = {
    "pass@1": 0.030,
    "pass@16": 0.114,
    "early reward": 0.020,
    "entropy": 0.0175,
    "entropy at equal reward": 0.0175,
    "repeated attempts": 0.0114,
    "repeated 4-grams": 0.0208,
    "log10 KL": 0.14,
    "clip fraction": 0.0021,
    "ratio gap, later epochs": 0.01,
    "ratio gap, epoch 1": 0.002,
    "log10 largest gradient norm": 0.1585,
    "log10 p99 of gradient norms": 0.1585,
    "collapse": 0.5,
}
"""Standard deviation over seeds of the difference between two arms, in the pilot from which the study was designed."""

COMPARISONS = comparisons(load_claims())


def sd_of(test: Comparison) -> float:
    claim = test.claim
    spread = np.std(test.ks) * len(test.ks) ** 0.5 if claim.slope else 1.0
    return PILOT_SD[claim.metric] / spread


def null_mean(test: Comparison) -> float:
    """Mean contrast under the null hypothesis next to the claim."""
    claim = test.claim
    mean = claim.margin if claim.expect == "equal" else claim.beyond * (1 if claim.expect == "higher" else -1)
    assert mean is not None
    return mean


@pytest.mark.parametrize("tails", ["normal", "t3"])
@pytest.mark.parametrize("test", COMPARISONS, ids=lambda t: f"{t.claim.id}-{t.claim.metric}-{t.lr}-k{t.ks[0]}")
def test_every_comparison_keeps_its_error_rate_on_null_data(test: Comparison, tails: str) -> None:
    """Data with the pilot's variances; 20,000 draws, whose rate has a standard error of 0.15 %.

    A t-test's rate does not depend on the variance. With heavy tails (t with 3 degrees of freedom) it errs less often.
    """
    rng, shape = np.random.default_rng(0), (DRAWS, len(test.claim.seeds))
    collapse, equal, beyond = test.claim.metric == "collapse", test.claim.expect == "equal", test.claim.beyond
    noise = rng.normal(0, 1, shape) if tails == "normal" else rng.standard_t(3, shape) / 3**0.5
    d = rng.choice([-1.0, 0.0, 1.0], shape) if collapse else null_mean(test) + sd_of(test) * noise
    reproduced, opposite = (float((p <= ALPHA).mean()) for p in test.p_values(d))
    nominal = (ALPHA if equal else ALPHA / 2) / test.choices  # two-sided tests are reproduced on one side
    assert reproduced <= nominal + 0.01
    assert opposite <= ALPHA / 2 + 0.01
    if not collapse and tails == "normal":  # exact tests of counts err less often
        assert reproduced >= nominal - 0.01
        assert beyond or opposite >= ALPHA / 2 / test.choices - 0.01


def run_of(key: Key, values: Mapping[str, float]) -> Metrics:
    """A run whose measures have these values."""
    columns = {"reward/mean": 0.5, "loss/entropy": 0.5, "rollout/retries": 1.0}
    columns |= {"loss/ratio_neg": 1.0, "loss/ratio_pos_first_epoch": 1.0, "loss/ratio_neg_first_epoch": 1.0}
    evaluation: dict[str, float] = {}
    for metric, value in values.items():
        match metric:
            case "pass@1":
                evaluation["eval/accuracy"] = value
            case "entropy":
                columns["loss/entropy"] = value
            case "repeated attempts":
                columns["rollout/repeats"] = value
            case "ratio gap, later epochs":
                columns["loss/ratio_pos"] = 1 + value * 2 / 3
            case "log10 largest gradient norm":
                columns["optimizer/grad_norm_max"] = 10**value
            case "collapse":
                columns["reward/mean"] = 0.0 if value else 0.5
            case _:
                raise KeyError(metric)
    train = {"step": np.arange(1.0, 11.0), **{name: np.full(10, value) for name, value in columns.items()}}
    return Metrics(key, 10, 3, train, {name: np.array([value]) for name, value in evaluation.items()})


def runs_of(values: Mapping[tuple[str, str, float, int, str], Numbers], first: int) -> dict[Key, Metrics]:
    """Runs from values over seeds by block, arm, learning rate, staleness and metric."""
    of_key: dict[Key, dict[str, float]] = {}
    for (block, arm, lr, k, metric), of_seed in values.items():
        for seed, value in enumerate(of_seed.tolist(), first):
            of_key.setdefault(Key(block, arm, lr, k, seed), {})[metric] = value
    return {key: run_of(key, of_run) for key, of_run in of_key.items()}


def is_wrong(judged: Judged, truth: float) -> bool:
    """Whether the verdict is false of a contrast with the mean `truth`."""
    claim = judged.test.claim
    within = claim.margin is not None and abs(truth) < claim.margin
    sign = {"higher": 1, "lower": -1, "equal": 0}[claim.expect]
    right = {
        "reproduced": within if claim.expect == "equal" else truth * sign > claim.beyond,
        "opposite": claim.margin is not None and abs(truth) > claim.margin if not sign else truth * sign < 0,
        "equal within the margin": within,
        "undecided": True,
    }
    return not right[judged.verdict]


STUDIES = 2000
"""Simulated studies; a rate of 5 % has a standard error of 0.5 %."""


def test_family_seldom_has_a_false_verdict() -> None:
    """Runs of the primary claims through `judge_all`. Every claim is on the edge of being true, collapses are even."""
    family = [replace(claim, lr=[claim.primary]) for claim in load_claims() if claim.primary]
    tests = comparisons(family)
    assert len(tests) == 7
    rng = np.random.default_rng(1)
    false = reproduced = 0
    for _ in range(STUDIES):
        values: dict[tuple[str, str, float, int, str], Numbers] = {}
        for test in tests:
            claim, n = test.claim, len(test.claim.seeds)
            arm, *other = claim.arms
            assert all(claim.arms[name] == -1 for name in other)
            for name in claim.arms:
                key = (claim.block, name, float(test.lr), test.ks[0], claim.metric)
                if claim.metric == "collapse":
                    values[key] = rng.integers(0, 2, n).astype(np.float64)
                else:
                    mean = 0.5 + (null_mean(test) if name == arm else 0.0)
                    values[key] = rng.normal(mean if other else mean - 0.5, sd_of(test) / len(claim.arms) ** 0.5, n)
        judged = judge_all(runs_of(values, 101), family)
        wrong = [is_wrong(j, 0.0 if j.test.claim.metric == "collapse" else null_mean(j.test)) for j in judged]
        false += any(wrong)
        reproduced += any(j.verdict == "reproduced" for j in judged)
    assert false / STUDIES <= ALPHA + 0.01  # two standard errors
    assert reproduced > 0


def test_holm_keeps_the_error_rate_of_the_family() -> None:
    """Seven t-tests, which unlike the family's exact and one-sided ones use all of alpha."""
    p = two_sided(np.random.default_rng(1).normal(0, 1, (DRAWS, 7, 12)))
    assert float((holm(p) <= ALPHA).any(-1).mean()) == pytest.approx(ALPHA, abs=0.01)


@pytest.mark.parametrize(
    ("expect", "chooser", "verdict"),
    [("higher", "aspo", "reproduced"), ("higher", "grpo", "opposite"), ("equal", "aspo", "reproduced")],
)
def test_choice_of_the_best_rate_keeps_the_error_rate(
    expect: Literal["higher", "equal"], chooser: str, verdict: str
) -> None:
    """One arm has two equal rates, the better of which is chosen by luck; the other's second rate is hopeless.

    The truth is no difference, and for equality a difference of the margin, against the chooser.
    """
    arms, rates, seeds = {"aspo": 1.0, "grpo": -1.0}, (1.5e-4, 5e-4), range(101, 113)
    claim = Claim("x", "x", "A", arms, "pass@1", expect, [*rates, "best"], seeds, margin=0.03)
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(STUDIES):
        values: dict[tuple[str, str, float, int, str], Numbers] = {}
        for arm in arms:
            handicap = 0.03 if expect == "equal" and arm == chooser else 0.0
            for lr in rates:
                loss = 0.2 if arm != chooser and lr == rates[1] else handicap
                values["A", arm, lr, 0, "pass@1"] = rng.normal(0.5 - loss, PILOT_SD["pass@1"] / 2**0.5, 12)
        (best,) = (j for j in judge_all(runs_of(values, 101), [claim]) if j.test.lr == "best")
        found += best.verdict == verdict
    nominal = ALPHA if expect == "equal" else ALPHA / 2
    assert found / STUDIES <= nominal + 0.008
    assert found > 0


def test_power_of_planned_seeds() -> None:
    """Pilots whose mean is their standard deviation, 12 seeds: the non-central t distribution, integrated over s."""
    claim = Claim("x", "x", "A", {"aspo": 1}, "pass@1", "higher", [1e-4], range(12))
    p, opposite = simulated_studies(Comparison(claim, 1e-4, (0,)), np.array([0.0, 1.0, 2.0]), np.random.default_rng(3))
    s = np.linspace(1e-4, 4, 20_001)  # sample over true standard deviation
    density = s**10 * np.exp(-11 * s**2 / 2)
    reached = np.array([0.5 * math.erfc((2.200985 * x - 12**0.5) / 2**0.5) for x in s])
    expected = float((density * reached).sum() / density.sum())
    assert float(((p <= ALPHA) & (p <= opposite)).mean()) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("expect", ["higher", "equal"])
def test_resolution_is_what_four_of_five_studies_find(expect: Literal["higher", "equal"]) -> None:
    claim = Claim("x", "x", "A", {"aspo": 1}, "pass@1", expect, [1e-4], range(12))
    found = resolution(Comparison(claim, 1e-4, (0,)), 0.03, 12, ALPHA)
    d = np.random.default_rng(2).normal(0 if expect == "equal" else found, 0.03, (DRAWS, 12))
    p = tost(d, found) if expect == "equal" else two_sided(d)
    assert float((p <= ALPHA).mean()) == pytest.approx(0.8, abs=0.03)
