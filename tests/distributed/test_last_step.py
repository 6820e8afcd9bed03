"""The end of a run: ranks leave together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import run, tiny_run

from megatron_aspo.commands import train as train_command
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import CheckpointConfig, TrainConfig

pytestmark = pytest.mark.distributed


def slow_page(folders: Sequence[Path]) -> Path:
    """A report of rank 0 that takes longer than everything after the last step."""
    time.sleep(4)
    return folders[0]


def end(config: RunConfig) -> float:
    train_command.run(config, report=slow_page)
    return time.time()


def test_ranks_wait_for_the_report_and_uploads_of_the_first(tmp_path: Path) -> None:
    """srun ends all ranks some time after the first one's end."""
    train = TrainConfig(steps=1, mini_batch_prompts=1, max_tokens_per_micro_batch=256)
    first, second = run(2, end, tiny_run(tmp_path, train=train, checkpoint=CheckpointConfig(every=0)))
    assert abs(first - second) < 2
