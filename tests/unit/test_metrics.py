"""Metrics of a batch of responses against counting by hand."""

import random

import numpy as np
import pytest

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.rewards.repetition import token_repetition, word_repetition
from megatron_aspo.rollout.metrics import pass_rates, sample_metrics, solve_rates


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0),
        ([1, 1, 1], 0),
        ([1, 1, 1, 1], 0),
        ([1, 1, 1, 1, 1], 1 / 2),
        ([1] * 13, 9 / 10),
        ([1, 2, 3, 4, 5, 6, 7, 8], 0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 2341 3412 4123 1234
        ([1, 2] * 4, 3 / 5),
    ],
)
def test_repetition(tokens: list[int], share: float) -> None:
    assert token_repetition(tokens) == pytest.approx(share)
    assert token_repetition(tuple(tokens)) == pytest.approx(share)


@pytest.mark.parametrize("kinds", [1, 2, 5, 200_000])
def test_repetition_is_that_of_sets_of_tuples(kinds: int) -> None:
    rng = random.Random(kinds)
    for length in range(60):
        tokens = [rng.randrange(kinds) for _ in range(length)]
        words = " ".join(f"w{token}" for token in tokens)
        for n in (1, 2, 3, 4, 5, 20):
            grams = [tuple(tokens[i : i + n]) for i in range(length - n + 1)]
            expected = 1 - len(set(grams)) / len(grams) if grams else 0.0
            assert word_repetition(words, n) == expected
            if n > 1:
                assert token_repetition(tokens, n) == expected


@pytest.mark.parametrize(
    ("prefix", "reward", "error", "accuracy", "unjudged"),
    [
        ("rollout", "reward/mean", "reward/standard_error", "reward/accuracy", "reward/unjudged"),
        ("eval", "eval/reward", "eval/reward_standard_error", "eval/accuracy", "eval/unjudged"),
    ],
)
def test_sample_metrics(prefix: str, reward: str, error: str, accuracy: str, unjudged: str) -> None:
    prompt = Prompt(0, "", (1,), {})
    samples = [
        Sample(
            prompt, 0, np.ones(5, np.int32), "stop", score=1.0, reward=1.0, repetition=0.5, repetition_words=39 / 41
        ),
        Sample(prompt, 0, np.array([1, 2, 3]), "length", score=0.25, reward=0.25),
        Sample(prompt, 1, np.array([1, 2]), "stop", reward=0.0, unjudged="worker died"),
        Sample(prompt, 1, np.array([]), "length", score=0.99, reward=0.99),
    ]
    assert sample_metrics(samples, prefix) == pytest.approx(
        {
            reward: 2.24 / 3,  # the one without a verdict does not count
            error: (0.99 - 1.25 / 2) / 2,  # with two problems, half the distance of their means
            accuracy: 1 / 3,
            unjudged: 1 / 4,
            f"{prefix}/response_length": 10 / 4,
            f"{prefix}/truncated": 2 / 4,
            f"{prefix}/repetition": 0.5 / 4,
            f"{prefix}/repetition_words": 39 / 41 / 4,
            f"{prefix}/count": 4,
        }
    )
    assert error not in sample_metrics(samples[:2], prefix)


def test_solve_rates() -> None:
    prompt = Prompt(0, "", (1,), {})

    def group(*rewards: float) -> list[Sample]:
        return [Sample(prompt, 0, np.ones(1, np.int32), "stop", score=reward) for reward in rewards]

    groups = [group(1, 1), group(0, 0.9), group(0, 0), group(1, 0), group(1, 1)]
    assert solve_rates(groups) == {"rollout/solve_all": 2 / 5, "rollout/solve_none": 2 / 5}
    groups[3][1].unjudged = groups[2][0].unjudged = groups[2][1].unjudged = "worker died"
    assert solve_rates(groups) == {"rollout/solve_all": 3 / 4, "rollout/solve_none": 1 / 4}
    assert solve_rates(groups[2:3]) == {}


def test_pass_rates() -> None:
    """With c right of n, 1 - C(n - c, k) / C(n, k): by hand."""

    def group(right: int, wrong: int, unjudged: int = 0) -> list[Sample]:
        scores = [(1.0, "")] * right + [(0.5, "")] * wrong + [(0.0, "worker died")] * unjudged
        return [
            Sample(Prompt(0, "", (), {}), 0, np.ones(1, np.int32), "stop", score=s, unjudged=why) for s, why in scores
        ]

    rates = pass_rates([group(1, 3), group(2, 2), group(0, 3, unjudged=1)])
    assert rates == pytest.approx({"eval/pass_at_2": (1 / 2 + 5 / 6 + 0) / 3, "eval/pass_at_4": (1 + 1) / 2})
    assert pass_rates([group(1, 0)]) == {}
