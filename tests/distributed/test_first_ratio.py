"""On a step's first mini-batch the policy is still the old one: every importance ratio is 1, and a warning if not."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import VOCAB, make_samples, run, run_config

from megatron_aspo.config import OptimizerConfig, ParallelConfig, TrainConfig
from megatron_aspo.distributed import distributed
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.train import update

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "tp2-sp": (2, ParallelConfig(tensor=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "cp2": (2, ParallelConfig(context=2)),
}


def first_step(weights: Path, parallel: ParallelConfig, disturbed: int | None) -> tuple[dict[str, float], str]:
    """Metrics and stderr of a step of two mini-batches and two epochs. In mini-batch `disturbed` one token of the
    last data-parallel rank has an old log-prob that is off by 0.02."""
    config = replace(
        run_config(parallel),
        optimizer=OptimizerConfig(lr=1e-3, lr_warmup_updates=0),
        train=TrainConfig(epochs=2, max_tokens_per_micro_batch=100),
    )
    stderr = io.StringIO()
    with distributed(config):
        policy = Policy(config, VOCAB)
        checkpoint.load_weights(weights / "current", policy)
        mini_batches = [policy.pack(make_samples()[:12]), policy.pack(make_samples()[12:])]
        for mini_batch in mini_batches:
            policy.fill_logprobs(mini_batch, "old_logprobs")
        if disturbed is not None and policy.dp_rank == policy.dp_size - 1 and policy.is_last_stage:
            batch = mini_batches[disturbed][-1]
            assert batch.old_logprobs is not None
            batch.old_logprobs[batch.loss_mask.nonzero()[-1]] += 0.02
        with contextlib.redirect_stderr(stderr):
            return update(policy, mini_batches, config), stderr.getvalue()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_ratio_is_one(layout: str, weights: Path) -> None:
    ranks, parallel = LAYOUTS[layout]
    for metrics, stderr in run(ranks, first_step, weights, parallel, None):
        assert metrics["loss/log_ratio_max_first"] <= 1e-5
        assert metrics["loss/approx_kl"] > 1e-5  # the later updates did move away
        assert "warning" not in stderr


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_first_ratio_that_is_not_one_is_warned_of_once(layout: str, weights: Path) -> None:
    ranks, parallel = LAYOUTS[layout]
    found = run(ranks, first_step, weights, parallel, 0)
    assert all(m["loss/log_ratio_max_first"] == pytest.approx(0.02, abs=1e-4) for m, _ in found)
    assert ["warning: max |log r| = 2.0e-02 on the step's first mini-batch" in text for _, text in found] == [
        rank == 0 for rank in range(ranks)
    ]


def test_a_later_mini_batch_does_not_warn(weights: Path) -> None:
    (metrics, stderr), _ = run(2, first_step, weights, ParallelConfig(), 1)
    assert metrics["loss/log_ratio_max_first"] <= 1e-5
    assert "warning" not in stderr
