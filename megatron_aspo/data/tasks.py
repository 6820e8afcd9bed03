"""Procedural problems of reasoning-gym."""

from __future__ import annotations

import bisect
import contextlib
import random
from collections.abc import Iterator
from typing import Any

from megatron_aspo.config.data import SourceConfig
from megatron_aspo.data.problem import Problem
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.reasoning_gym import import_reasoning_gym

STREAM_SIZE = 1 << 20
"""Problems until the stream repeats. Some tasks make a list of that length."""


class TaskSource:
    """Problems of a task's seeded, random-access stream, or of one such stream for each stage of a curriculum."""

    def __init__(self, config: SourceConfig, seed: int) -> None:
        self._seed = seed
        self._starts = [stage.after for stage in config.curriculum]
        arguments = [config.task_args] + [config.task_args | stage.task_args for stage in config.curriculum]
        self._stages = [_create_dataset(config.task, seed, args) for args in arguments]

    def problem(self, position: int) -> Problem:
        stage = self._stages[bisect.bisect_right(self._starts, position)]
        with _seeded_random(f"{self._seed} {position}"):
            entry: dict[str, Any] = stage[position % STREAM_SIZE]
        question, metadata = entry["question"], entry["metadata"]
        return Problem(question, {**metadata, "question": question}, entry, metadata["source_dataset"])


@contextlib.contextmanager
def _seeded_random(seed: str) -> Iterator[None]:
    """Seed the module `random`, from which some tasks draw beside their own generator, and restore it."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _create_dataset(task: str, seed: int, task_args: dict[str, Any]) -> Any:
    reasoning_gym = import_reasoning_gym()
    known = reasoning_gym.factory.DATASETS
    if task not in known:
        raise UserError(
            f"reasoning-gym has no task {task!r}; it has {len(known)}, among them chain_sum, "
            "basic_arithmetic, products, gcd, count_bits"
        )
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=STREAM_SIZE, **task_args)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"data.task_args do not fit reasoning-gym's {task}: {error}") from None
