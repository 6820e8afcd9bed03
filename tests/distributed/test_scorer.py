"""Ranks score a shard of the samples each, and all ranks get all scores."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from ranks import run, run_config

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.ranks import process_group as distributed_module
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rewards.scoring import Scorer

pytestmark = pytest.mark.distributed


def score(config: RunConfig, folder: Path) -> tuple[list[float], list[str]]:
    judged = folder / os.environ["RANK"]

    def judge(response: str, row: dict[str, int]) -> float:
        with open(judged, "a") as file:  # a worker of the rank calls it
            file.write(response)
        return float(response) + row["base"]

    samples = [
        Sample(Prompt(i, "", (), {"base": 100 * i}), i, np.ones(1, np.int32), "stop", text=str(i)) for i in range(7)
    ]
    with distributed(config), Scorer(config.data, config.reward, config.rollout, judge) as scorer:
        scorer.score(samples)
    return [sample.score for sample in samples], sorted(judged.read_text())


def test_every_sample_is_judged_once_and_scored_on_every_rank(tmp_path: Path) -> None:
    everyones = run(3, score, replace(run_config(), data=DataConfig(path="-", reward="json:loads")), tmp_path)
    assert [scores for scores, _ in everyones] == [[101.0 * i for i in range(7)]] * 3
    assert [judged for _, judged in everyones] == [["0", "3", "6"], ["1", "4"], ["2", "5"]]


def score_slowly(config: RunConfig) -> list[float]:
    """Scores while one rank's judge takes longer than the timeout of the other groups."""

    def judge(response: str, row: dict[str, int]) -> float:
        if response == "1":
            time.sleep(8)
        return float(response)

    samples = [Sample(Prompt(i, "", (), {}), i, np.ones(1, np.int32), "stop", text=str(i)) for i in range(2)]
    # Each rank is a separate process, so this patches one rank alone.
    distributed_module.TIMEOUT = timedelta(seconds=4)
    with distributed(config), Scorer(config.data, config.reward, config.rollout, judge) as scorer:
        scorer.score(samples)
    return [sample.score for sample in samples]


def test_a_verdict_may_take_longer_than_a_collective() -> None:
    config = replace(run_config(), data=DataConfig(path="-", reward="json:loads"))
    assert run(2, score_slowly, config) == [[0.0, 1.0]] * 2
