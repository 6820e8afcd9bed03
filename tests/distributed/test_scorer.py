"""Ranks judge a part of the samples each, and all get all scores."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta

import pytest
from ranks import run, run_config

from megatron_aspo import distributed as distributed_module
from megatron_aspo.config import RunConfig
from megatron_aspo.config_data import DataConfig
from megatron_aspo.distributed import distributed
from megatron_aspo.rewards.scoring import Scorer
from megatron_aspo.types import Prompt, Sample

pytestmark = pytest.mark.distributed


def score(config: RunConfig) -> tuple[list[float], list[str]]:
    judged: list[str] = []

    def judge(response: str, row: dict[str, int]) -> float:
        judged.append(response)
        return float(response) + row["base"]

    samples = [Sample(Prompt(i, "", (), {"base": 100 * i}), i, (1,), "stop", text=str(i)) for i in range(7)]
    with distributed(config), Scorer(config, judge) as scorer:
        scorer.score(samples)
    return [sample.score for sample in samples], judged


def test_every_sample_is_judged_once_and_scored_on_every_rank() -> None:
    everyones = run(3, score, replace(run_config(), data=DataConfig(path="-", reward="json:loads")))
    assert [scores for scores, _ in everyones] == [[101.0 * i for i in range(7)]] * 3
    assert [judged for _, judged in everyones] == [["0", "3", "6"], ["1", "4"], ["2", "5"]]


def score_slowly(config: RunConfig) -> list[float]:
    """While one rank's judge takes longer than the ranks of other groups wait for each other."""

    def judge(response: str, row: dict[str, int]) -> float:
        if response == "1":
            time.sleep(8)
        return float(response)

    samples = [Sample(Prompt(i, "", (), {}), i, (1,), "stop", text=str(i)) for i in range(2)]
    # A rank is a process of its own, so this patches it alone.
    distributed_module.TIMEOUT = timedelta(seconds=4)
    with distributed(config), Scorer(config, judge) as scorer:
        scorer.score(samples)
    return [sample.score for sample in samples]


def test_a_verdict_may_take_longer_than_a_collective() -> None:
    config = replace(run_config(), data=DataConfig(path="-", reward="json:loads"))
    assert run(2, score_slowly, config) == [[0.0, 1.0]] * 2
