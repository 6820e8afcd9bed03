"""Advantages against other implementations, the definitions in plain Python, and hand-computed ones."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config import rollout
from megatron_aspo.config.rewards import RewardConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.rollout.advantages import ADVANTAGES, fill_advantages, find_advantage, has_signal
from megatron_aspo.rollout.choice import check_engine

VECTORS = json.loads((Path(__file__).parent.parent / "data/advantage_vectors.json").read_text())["cases"]
OF_GROUPS = ("grpo", "no_std", "rloo", "maxrl")


def group_of(*rewards: float) -> list[Sample]:
    prompt, one = Prompt(0, "", (1,), {}), np.ones(1, np.int32)
    return [Sample(prompt, 0, one, "stop", score=reward, reward=reward, advantage=9.0) for reward in rewards]


def advantages(groups: list[list[Sample]], name: str = "grpo") -> list[list[float]]:
    fill_advantages(groups, name)
    return [[sample.advantage for sample in group] for group in groups]


def by_definition(name: str, groups: list[list[float]]) -> list[list[float]]:
    """The definitions, in plain Python."""
    if name.startswith("reinforce++"):
        if name == "reinforce++_baseline":
            groups = [[r - statistics.fmean(group) for r in group] for group in groups]
        whole = [r for group in groups for r in group]
        mean, deviation = statistics.fmean(whole), statistics.stdev(whole)
        return [[(r - mean) / (deviation + 1e-6) for r in group] for group in groups]
    found: list[list[float]] = []
    for group in groups:
        mean = statistics.fmean(group)
        others = [(sum(group) - r) / (len(group) - 1) for r in group]
        scale = {"grpo": statistics.stdev(group) + 1e-6, "maxrl": mean + 1e-6 if mean > 0 else math.inf}.get(name, 1.0)
        baselines = others if name == "rloo" else [mean] * len(group)
        found.append([(r - b) / scale for r, b in zip(group, baselines, strict=True)])
    return found


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
def test_vectors(case: dict[str, Any], name: str) -> None:
    """The tolerance covers where others add their epsilon: verl's whitening has it below the root."""
    found = advantages([group_of(*rewards) for rewards in case["rewards"]], name)
    for column, expected, plain in zip(found, case["expect"][name], by_definition(name, case["rewards"]), strict=True):
        assert column == pytest.approx(expected, rel=5e-6, abs=1e-11)
        assert column == pytest.approx(plain, rel=1e-12, abs=1e-14)


def test_names() -> None:
    assert tuple(ADVANTAGES) == rollout.ADVANTAGES
    with pytest.raises(ValueError, match=r"advantage='rlo' is neither one of grpo, .* did you mean rloo"):
        RolloutConfig(advantage="rlo")
    with pytest.raises(UserError, match="cannot import nowhere:function"):
        check_engine(RolloutConfig(advantage="nowhere:function"), RewardConfig())


@pytest.mark.parametrize(
    ("rewards", "deviation"),
    [
        ((0.0, 1.0), math.sqrt(0.5)),
        ((0.0, 0.0, 0.0, 1.0), 0.5),
        ((1.0, 2.0, 3.0, 4.0), math.sqrt(5 / 3)),
        ((-2.0, 0.5, 0.5, 0.5), 1.25),
        ((0.01, 1.0, 0.01), 0.99 / math.sqrt(3)),
    ],
)
def test_unbiased_deviation(rewards: tuple[float, ...], deviation: float) -> None:
    group = group_of(*rewards)
    mean = sum(rewards) / len(rewards)
    expected = [(reward - mean) / (deviation + 1e-6) for reward in rewards]
    assert advantages([group]) == [pytest.approx(expected, rel=1e-12)]
    assert sum(s.advantage for s in group) == pytest.approx(0, abs=1e-12)
    assert has_signal(group)


def test_samples_without_a_verdict_are_no_part_of_the_group() -> None:
    group = group_of(1.0, 0.0, 0.0, 1.0, 0.0)
    group[1].unjudged = group[4].unjudged = "timeout"
    deviation = math.sqrt(1 / 3)  # of 1, 0, 1, whose mean is 2/3
    expected = [1 / 3 / (deviation + 1e-6), 0, -2 / 3 / (deviation + 1e-6), 1 / 3 / (deviation + 1e-6), 0]
    assert advantages([group]) == [pytest.approx(expected, rel=1e-12)]
    assert has_signal(group)
    assert not has_signal([group[0], group[1], group[3]])  # 1, 1 and no verdict
    for unjudged in (group[:2], group[1:2]):
        assert advantages([unjudged]) == [[0.0] * len(unjudged)]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_samples_without_a_verdict_change_no_other_advantage(name: str) -> None:
    rewards = [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0, 1.0], [0.25, 0.75]]
    expected = advantages([group_of(*group) for group in rewards], name)
    groups = [group_of(*group, 7.0) for group in rewards] + [group_of(3.0)]
    for group in groups:
        group[-1].unjudged = "timeout"
    assert advantages(groups, name) == [[*column, 0.0] for column in expected] + [[0.0]]


@pytest.mark.parametrize("name", OF_GROUPS)
@pytest.mark.parametrize("rewards", [(0.0,) * 4, (1.0,) * 8, (0.1,) * 3, (0.01,) * 6, (1.0,)])
def test_equal_rewards_teach_nothing(rewards: tuple[float, ...], name: str) -> None:
    """Advantages are exactly 0, even if rounding shifts the mean of equal numbers. Otherwise they would count as A <
    0."""
    group = group_of(*rewards)
    assert advantages([group, group_of(0.0, 1.0)], name)[0] == [0.0] * len(rewards)
    assert not has_signal(group)


@pytest.mark.parametrize("name", ["reinforce++", "reinforce++_baseline"])
def test_a_batch_of_equal_rewards_teaches_nothing(name: str) -> None:
    assert advantages([group_of(0.1, 0.1, 0.1), group_of(0.1)], name) == [[0.0] * 3, [0.0]]
    assert advantages([], name) == []


def test_reinforce_with_a_baseline_leaves_groups_without_signal_at_zero() -> None:
    groups = [group_of(1.0, 1.0), group_of(0.0, 1.0)]
    assert advantages(groups, "reinforce++_baseline")[0] == [0.0, 0.0]
    assert advantages(groups, "reinforce++")[0] == pytest.approx([0.5, 0.5], rel=1e-5)  # mean 3/4, deviation 1/2


def test_maxrl_needs_a_positive_mean() -> None:
    assert advantages([group_of(-0.5, 0.0, 0.25)], "maxrl") == [[0.0, 0.0, 0.0]]


MODULE = """
def halves(groups):
    return [0.5 * rewards for rewards in groups]

def whole(groups):
    return [groups[0]]

def nothing(groups):
    return [rewards * float("nan") for rewards in groups]

def fails(groups):
    return groups.rewards

def two(groups, config):
    return groups
"""


def test_a_function_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_advantages.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    groups = [group_of(1.0, 0.0), group_of(0.5)]
    assert advantages(groups, "my_advantages:halves") == [[0.5, 0.0], [0.25]]
    for name, message in (
        ("whole", "must return one finite number per reward"),
        ("nothing", "must return one finite number per reward"),
        ("fails", "failed: AttributeError: 'list' object has no attribute 'rewards'"),
    ):
        with pytest.raises(RunError, match=f"rollout.advantage=my_advantages:{name} {message}"):
            fill_advantages(groups, f"my_advantages:{name}")
    with pytest.raises(UserError, match=r"my_advantages:two\(groups, config\) must take \(groups\)"):
        find_advantage("my_advantages:two")
