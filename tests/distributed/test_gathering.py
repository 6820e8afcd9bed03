"""Waiting for ranks: log lines name the late ranks and their phase, a limit ends the wait, and all gatherings share
one group."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from ranks import ends, run, run_config

from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.journal.clock import Clock
from megatron_aspo.ranks import gathering
from megatron_aspo.ranks.gathering import gather_objects
from megatron_aspo.ranks.process_group import distributed

pytestmark = pytest.mark.distributed


def sleep_in_the_reward(config: RunConfig, sleeper: int, seconds: float) -> list[int]:
    with distributed(config):
        gather_objects("first")
        gathering.FIRST_NOTICE = 1.0  # each rank is a separate process, so this patches one rank alone
        with Clock()("reward"):
            if dist.get_rank() == sleeper:
                time.sleep(seconds)
        return gather_objects(dist.get_rank())


def wait_for_a_message(config: RunConfig, seconds: float) -> None:
    with distributed(config) as channel:
        assert channel is not None
        gathering.FIRST_NOTICE = 1.0
        if channel.role == "training":
            channel.receive()
            return
        with Clock()("rollout"):
            time.sleep(seconds)
        channel.send("samples")
        assert channel.receive() is None


def waits(text: str) -> list[str]:
    return re.findall("^waiting .*$", text, re.MULTILINE)


@pytest.mark.parametrize("sleeper", [0, 2])
def test_a_line_names_the_ranks_waited_for(sleeper: int) -> None:
    results = ends(3, sleep_in_the_reward, run_config(), sleeper, 5.5)
    assert [code for code, _ in results] == [0, 0, 0]
    lines = {rank: waits(text) for rank, (_, text) in enumerate(results)}
    reporter = 1 if sleeper == 0 else 0
    late = f"for 1 of 3 ranks: rank {sleeper} (reward)"
    assert lines.pop(reporter) == [f"waiting for {seconds} s {late}" for seconds in (1, 2, 4)]
    assert list(lines.values()) == [[], []]


def test_a_line_names_the_rollout_ranks_and_their_phase() -> None:
    config = run_config(rollout=RolloutConfig(engine="vllm", ranks=2))
    results = ends(4, wait_for_a_message, config, 3.0)
    assert [code for code, _ in results] == [0] * 4
    late = "for 2 of 2 ranks: rank 2 (rollout), rank 3 (rollout)"
    assert [waits(text) for _, text in results] == [
        [f"waiting for {seconds} s {late}" for seconds in (1, 2)],
        [],
        [],
        [],
    ]


@pytest.mark.parametrize(
    ("function", "ranks", "late"),
    [
        (sleep_in_the_reward, 0, "1 of 2 ranks: rank 1 (reward)"),
        (wait_for_a_message, 1, "1 of 1 ranks: rank 1 (rollout)"),
    ],
)
def test_the_wait_has_a_limit(function: Callable[..., Any], ranks: int, late: str) -> None:
    config = run_config(rollout=RolloutConfig(engine="vllm", ranks=ranks) if ranks else RolloutConfig())
    config = replace(config, train=replace(config.train, wait_limit_hours=0.001))
    arguments = (1, 8.0) if function is sleep_in_the_reward else (8.0,)
    (code, text), _ = ends(2, function, config, *arguments)
    assert code == 1
    assert f"RunError: waited train.wait_limit_hours=0.001 for {late}" in text


def gather_twice(config: RunConfig) -> tuple[list[Any], int]:
    """The objects of two gatherings, and the number of process groups that these created."""
    with distributed(config):
        groups = dist.distributed_c10d._world.pg_map
        before = len(groups)
        return [gather_objects(dist.get_rank()) for _ in range(2)], len(groups) - before


def test_all_gatherings_share_a_group() -> None:
    assert run(2, gather_twice, run_config()) == [([[0, 1], [0, 1]], 0)] * 2
