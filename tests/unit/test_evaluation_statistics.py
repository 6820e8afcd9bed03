"""avg@k and pass@k against numbers by hand, and coverage of the intervals in a simulation."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from megatron_aspo.rollout.statistics import (
    LEVEL,
    difference_interval,
    mean_with_interval,
    pass_at_k,
    proportion_interval,
)

Rates = Callable[[np.random.Generator, int], npt.NDArray[np.float64]]


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [
        (5, 2, 2, 7 / 10),
        (5, 2, 3, 9 / 10),
        (4, 2, 2, 5 / 6),
        (8, 3, 4, 13 / 14),
        (64, 1, 32, 1 / 2),
        (200, 1, 100, 1 / 2),
    ],
)
def test_pass_at_k_by_hand(samples: int, correct: int, k: int, expected: float) -> None:
    assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for samples in range(1, 7):
        for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(
    ("samples", "correct", "k", "message"),
    [(4, 1, 5, "k=5 must lie in"), (4, 1, 0, "k=0 must"), (4, 5, 1, "correct=5 must"), (4, -1, 1, "correct=-1 must")],
)
def test_impossible_numbers(samples: int, correct: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(samples, correct, k)


@pytest.mark.parametrize("values", [[], [0.5, 1.1], [-0.1]])
def test_values_that_are_no_rates(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\]"):
        mean_with_interval(values)


def test_interval_of_a_proportion() -> None:
    # Newcombe, Stat. Med. 17 (1998), table I, gives 0.2553 to 0.3662 for 81 of 263 by Wilson's method, which shares the
    # centre with Agresti and Coull's; 0.1898 is Agresti and Coull's for 0 of 20.
    assert proportion_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1.1e-4)
    assert proportion_interval(0.0, 20) == pytest.approx((0.0, 0.1898), abs=5e-5)
    assert proportion_interval(1.0, 20) == pytest.approx((0.8102, 1.0), abs=5e-5)


def test_interval_of_a_difference() -> None:
    # Newcombe, Stat. Med. 17 (1998) 873, table II: 56/70 - 48/80 gives 0.0524 to 0.3339 by method 10, from Wilson's
    # intervals. Agresti and Coull's contain them.
    low, high = difference_interval((48 / 80, 80), (56 / 70, 70))
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=1.1e-3)
    assert low < 0.0524 < 0.3339 < high


def test_interval_of_solved_and_unsolved_problems_is_agresti_and_coulls() -> None:
    # t = 2.26216 for 9 degrees of freedom: equivalent to t^2 = 5.1174 further problems, half of them solved.
    estimate = mean_with_interval([1.0] * 3 + [0.0] * 7)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.3, 0.08716, 0.64824), abs=2e-5)
    none, every = mean_with_interval([0.0] * 30), mean_with_interval([1.0] * 30)
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, 0.145025), abs=2e-6)
    assert (every.value, every.low, every.high) == pytest.approx((1, 0.854975, 1), abs=2e-6)
    single = mean_with_interval([0.25])
    assert (single.value, single.low, single.high) == (0.25, 0.0, 1.0)


SCENARIOS: dict[str, tuple[Rates, float]] = {  # solve rates of n problems, and their mean over all problems
    "as of AIME": (lambda rng, n: rng.beta(0.3, 0.7, n), 0.3),
    "nearly all solved": (lambda rng, n: rng.beta(2.0, 0.3, n), 2 / 2.3),
    "all alike": (lambda rng, n: rng.beta(5.0, 5.0, n), 0.5),
    "rare": (lambda rng, n: rng.beta(0.1, 2.0, n), 0.1 / 2.1),
    "very rare": (lambda rng, n: rng.beta(0.05, 3.0, n), 0.05 / 3.05),
    "a few easy ones": (lambda rng, n: np.where(rng.random(n) < 0.05, 0.9, 0.01), 0.05 * 0.9 + 0.95 * 0.01),
    "always or never": (lambda rng, n: (rng.random(n) < 0.1).astype(np.float64), 0.1),
}


@pytest.mark.parametrize(("problems", "samples"), [(30, 1), (30, 4), (30, 32), (272, 8)])
@pytest.mark.parametrize("name", SCENARIOS)
def test_intervals_cover(name: str, problems: int, samples: int) -> None:
    rng = np.random.default_rng([problems, samples])
    draw, truth = SCENARIOS[name]
    repeats = 1500
    inside = 0
    for _ in range(repeats):
        estimate = mean_with_interval(list(rng.binomial(samples, draw(rng, problems)) / samples))
        inside += estimate.low <= truth <= estimate.high
    assert inside / repeats >= LEVEL - 0.0115  # two standard errors of 1500 repeats
    if name == "as of AIME" and samples > 1:  # and are no wider than necessary
        assert inside / repeats <= LEVEL + 0.016


def test_intervals_of_pass_at_k_cover() -> None:
    rng = np.random.default_rng(0)
    rates = rng.beta(0.3, 0.7, 2_000_000)
    truth = float((1 - (1 - rates) ** 8).mean())
    inside = 0
    for _ in range(1000):
        correct = rng.binomial(32, rng.beta(0.3, 0.7, 30))
        estimate = mean_with_interval([pass_at_k(32, c, 8) for c in correct.tolist()])
        inside += estimate.low <= truth <= estimate.high
    assert 0.938 <= inside / 1000 <= 0.975
