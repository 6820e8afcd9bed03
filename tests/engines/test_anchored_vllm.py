"""Runs with vLLM on a rank of its own whose ratio is anchored at the sampler: stale batches, and updates in flight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run, run_config

from megatron_aspo.commands import train as train_command
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import CheckpointConfig, EvalConfig, OptimizerConfig, TrainConfig
from megatron_aspo.journal.log import read_metrics

pytestmark = pytest.mark.engines


def length_is_even(response: str, row: dict[str, Any]) -> float:
    """A reward that differs within most groups of a model with random weights."""
    return float(len(response) % 2 == 0)


def train_once(config: RunConfig) -> None:
    assert train_command.run(config, reward=length_is_even)


@pytest.mark.parametrize(
    "older",
    [{"max_staleness": 2}, {"max_staleness": 1, "in_flight": True, "oversample": 1.25, "batch_size": 4}],
    ids=["stale", "in flight"],
)
def test_the_ratio_is_the_samplers_and_no_pass_for_old_log_probs_is_made(older: dict[str, Any], tmp_path: Path) -> None:
    """With one update per batch pi is pi_old, so log r is the distance to the sampler: rounding in batches of the
    current weights, the updates since in older tokens."""
    rollout: dict[str, Any] = {"prompts_per_step": 8, "responses_per_prompt": 4, "max_response_tokens": 20} | older
    config = run_config(
        name="run",
        output_dir=str(tmp_path),
        # vLLM's attention on a CPU requires a head dimension of at least 32.
        model=ModelConfig(hidden_size=128, ffn_hidden_size=192, max_sequence_length=40, init_std=0.1),
        data=DataConfig(
            task_args={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            prompt_template="{expression} =",
        ),
        rollout=RolloutConfig(engine="vllm", ranks=1, dynamic_sampling=False, kv_cache_gb=0.1, **rollout),
        loss=PolicyLossConfig(anchor="rollout"),
        optimizer=OptimizerConfig(lr=1e-2, lr_warmup_updates=0),
        train=TrainConfig(steps=6, mini_batch_prompts=8, epochs=1, max_tokens_per_micro_batch=1024, mismatch_every=1),
        eval=EvalConfig(every=0, at_start=False, at_end=False),
        checkpoint=CheckpointConfig(every=0),
    )
    run(2, train_once, config)
    steps = [record for record in read_metrics(tmp_path / "run") if record["phase"] == "train"]
    assert len(steps) == 6
    for step in steps:
        assert "time/old_logprobs" not in step
        assert step["optimizer/grad_norm"] > 0.01
        assert step["loss/update_logprob_diff"] <= 1e-6
        assert step["loss/log_ratio_max"] == pytest.approx(step["mismatch/logprob_diff_max"], abs=1e-5)
        if "in_flight" not in older:  # current weights behind an older KV cache are no matter of rounding
            assert step.get("mismatch/logprob_diff_current", 0.0) < 1e-5
    aged = [step for step in steps if "mismatch/logprob_diff_older" in step]
    assert len(aged) >= 3
    assert max(step["mismatch/logprob_diff_older"] for step in aged) > 0.01
    assert any(abs(step["loss/ratio_pos"] - 1) > 1e-3 for step in aged)
