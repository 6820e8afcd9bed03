"""Pipeline stages without experts, as the first of DeepSeek-V3: a part of their optimizer has no parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run
from test_resume import learn
from test_weights import config_of, policy_of
from tiny_models import write_model

from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import OptimizerConfig
from megatron_aspo.policy import checkpoint
from megatron_aspo.ranks.process_group import distributed

pytestmark = [pytest.mark.engines, pytest.mark.distributed]

TOGETHER = (2, ParallelConfig(expert=2))
APART = (4, ParallelConfig(expert=2, pipeline=2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("deepseek-v3", tmp_path_factory.mktemp("model"))


def config_at(model: Path, parallel: ParallelConfig) -> RunConfig:
    return replace(config_of(model, parallel), optimizer=OptimizerConfig(lr=1e-3, lr_warmup_updates=0, clip_grad=0.5))


def save(config: RunConfig, root: Path) -> list[float]:
    """Gradient norms of the two updates after a checkpoint of two."""
    with distributed(config), policy_of(config) as policy:
        policy.keep_reference()
        learn(policy, range(2))
        checkpoint.save(root, 2, policy, {})
        return [update["grad_norm"] for update in learn(policy, range(2, 4))]


def load(config: RunConfig, root: Path) -> list[float]:
    with distributed(config), policy_of(config) as policy:
        policy.keep_reference()
        assert checkpoint.load(root / "step_000002", policy) == (2, {})
        return [update["grad_norm"] for update in learn(policy, range(2, 4))]


@pytest.mark.parametrize("saved", [TOGETHER, APART], ids=["experts in the only stage", "first stage without experts"])
def test_checkpoint_of_a_stage_without_experts(saved: tuple[int, ParallelConfig], model: Path, tmp_path: Path) -> None:
    ranks, parallel = saved
    expected, *_ = run(ranks, save, config_at(model, parallel), tmp_path)
    assert len(expected) == 2
    for ranks, parallel in (TOGETHER, APART):
        for found in run(ranks, load, config_at(model, parallel), tmp_path):
            assert found == pytest.approx(expected, rel=1e-4)
