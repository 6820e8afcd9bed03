"""On a step's first mini-batch the policy equals the old policy: every importance ratio is 1, otherwise a warning is
printed."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import make_samples, open_policy, run, run_config
from test_layouts import LAYOUTS as ALL_LAYOUTS

from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.training import OptimizerConfig, TrainConfig
from megatron_aspo.train import set_logprobs, update

pytestmark = pytest.mark.distributed

LAYOUTS = {name: ALL_LAYOUTS[name] for name in ("dp2", "tp2", "tp2-sp", "pp2", "cp2")}


def first_step(weights: Path, parallel: ParallelConfig, disturbed: int | None) -> tuple[dict[str, float], str]:
    """Metrics and stderr of a step of two mini-batches and two epochs. In mini-batch `disturbed` one token of the
    last data-parallel rank has an old log-prob that is off by 0.02."""
    config = replace(
        run_config(parallel),
        optimizer=OptimizerConfig(lr=1e-3, lr_warmup_updates=0),
        train=TrainConfig(epochs=2, max_tokens_per_micro_batch=100),
    )
    stderr = io.StringIO()
    with open_policy(config, weights / "current") as policy:
        mini_batches = [policy.pack(make_samples()[:12]), policy.pack(make_samples()[12:])]
        set_logprobs(policy, mini_batches)
        group = policy.dp_cp_group
        if disturbed is not None and group.rank() == group.size() - 1 and policy.is_last_stage:
            batch = mini_batches[disturbed][-1]
            assert batch.old_logprobs is not None
            batch.old_logprobs[batch.loss_mask.nonzero()[-1]] += 0.02
        with contextlib.redirect_stderr(stderr):
            return update(policy, mini_batches, config.train, config.loss), stderr.getvalue()


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
    assert ["max |log r| = 2.0e-02" in text for _, text in found] == [rank == 0 for rank in range(ranks)]


def test_a_later_mini_batch_does_not_warn(weights: Path) -> None:
    (metrics, stderr), _ = run(2, first_step, weights, ParallelConfig(), 1)
    assert metrics["loss/log_ratio_max_first"] <= 1e-5
    assert "warning" not in stderr
