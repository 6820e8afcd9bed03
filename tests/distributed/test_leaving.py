"""Ranks of both roles leave Python at the end of a run. A thread that is still inside torch would abort its rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.ranks.launch import _free_port
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.weight_lanes import ReceivedWeights, WeightSender
from megatron_aspo.rollout.weight_sync import Weight

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TRIALS = 10


class OneTensor:
    weight_version, stage = 0, 0

    def share(self) -> Iterator[Weight]:
        yield os.environ["RANK"], torch.arange(1000.0)


def refit_and_close(training: int, rank: int, port: int) -> None:
    """A run of one refit. The last training rank ends a little later than the others."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, training + 1, training + 1, port)), strict=True))
    source: Any = OneTensor()
    with distributed(RunConfig("leaving", rollout=RolloutConfig(engine="vllm", ranks=1))) as channel:
        assert channel is not None
        if channel.role == "training":
            WeightSender(source, channel, 1 << 20, with_checksums=False).send()
        else:
            received = ReceivedWeights(channel, with_checksums=False)
            assert channel.receive() == ("refit", 0)
            received.weight_version = 0
            assert [name for name, _ in received.weights()] == [str(peer) for peer in range(training)]
            assert channel.receive() is None
            received.close()
    if 0 < rank == training - 1:
        time.sleep(0.05)


def main(training: int) -> None:
    """Print the exit codes of the ranks of each trial. Forks leave Python as programs do, unlike multiprocessing's."""
    torch.set_num_threads(1)
    codes: list[list[int]] = []
    for _ in range(TRIALS):
        port, children = _free_port(), list[int]()
        for rank in range(training + 1):
            if not (child := os.fork()):
                refit_and_close(training, rank, port)
                sys.exit(0)
            children.append(child)
        codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    print(json.dumps(codes))


@pytest.mark.parametrize("training", [1, 2])
def test_ranks_of_a_finished_run_exit_with_code_0(training: int) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", f"import test_leaving; test_leaving.main({training})"]
    environment = {**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[0] * (training + 1)] * TRIALS, done.stderr
