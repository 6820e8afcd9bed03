"""A checkpoint that cannot be written: the cause in a line, and the last one intact."""

from __future__ import annotations

import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import VOCAB, make_samples, run, run_config

from megatron_aspo.config import PolicyLossConfig
from megatron_aspo.distributed import distributed
from megatron_aspo.errors import RunError
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.trainer import Policy, UpdateMetrics
from megatron_aspo.run_folder import list_checkpoints

pytestmark = pytest.mark.distributed


def save_twice(root: Path) -> str:
    """A checkpoint, and one that no file of may exceed a kilobyte: what the second save says."""
    config = replace(run_config(), name="full")
    with distributed(config):
        policy = Policy(config, VOCAB)
        batches = policy.pack(make_samples()[:4])
        policy.fill_logprobs(batches, "old_logprobs")
        policy.train_step(batches, PolicyLossConfig(), UpdateMetrics())
        checkpoint.save(root, 1, policy, {})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as on a full disk
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            checkpoint.save(root, 2, policy, {})
        except RunError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    (told,) = run(1, save_twice, tmp_path)
    assert told.startswith(f"cannot write {tmp_path}/step_000002.partial: ")
    assert " GiB are free on its disk" in told
    assert "\n" not in told
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000001"]
