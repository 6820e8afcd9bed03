"""If the gradient is not finite on one rank, no rank changes its state; too many skips in a row end the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import make_samples, open_policy, run, run_config
from test_resume import learning_config
from torch import Tensor

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.errors import RunError
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.trainer import Policy

pytestmark = pytest.mark.distributed

MODEL = run_config().model
EXPERTS = replace(MODEL, num_experts=4, moe_ffn_hidden_size=32)
CASES: dict[str, tuple[int, ParallelConfig, bool, str, float]] = {
    # ranks, layout, experts, the parameter that the last rank corrupts, its gradient
    "alone": (1, ParallelConfig(), False, "linear_qkv", float("nan")),
    "alone, infinite": (1, ParallelConfig(), False, "linear_fc2", float("-inf")),
    "dp2": (2, ParallelConfig(), False, "linear_qkv", float("nan")),
    "tp2": (2, ParallelConfig(tensor=2), False, "linear_fc1", float("nan")),
    "tp2, a parameter that both ranks hold": (2, ParallelConfig(tensor=2), False, "layernorm", float("nan")),
    "pp2": (2, ParallelConfig(pipeline=2), False, "linear_fc1", float("nan")),
    "ep2": (2, ParallelConfig(expert=2), True, "experts", float("nan")),
}


@contextmanager
def spoiled(policy: Policy, part: str, value: float) -> Iterator[None]:
    """Set one element of one gradient of the last rank to `value` after the backward pass, before gradients are
    reduced."""
    settings = policy.model.config
    finalize = settings.finalize_model_grads_func
    gradient = next(p.main_grad for name, p in policy.model.named_parameters() if part in name)

    def spoil(*args: Any, **kwargs: Any) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            gradient.view(-1)[0] = value
        finalize(*args, **kwargs)

    settings.finalize_model_grads_func = spoil
    yield
    settings.finalize_model_grads_func = finalize


def state(policy: Policy) -> list[Tensor]:
    """Weights, the optimizer's master copies, moments and counters."""
    tensors = list(policy.model.parameters())
    for optimizer in policy.optimizer.chained_optimizers:
        tensors += optimizer.get_parameters()
        for states in optimizer.optimizer.state.values():
            tensors += [value for value in states.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def skip_one(case: str, skip: bool) -> tuple[Any, Any, Any]:
    """(whether the skipped update changed nothing, metrics of the next update, the state after it)."""
    _, parallel, experts, part, value = CASES[case]
    config = replace(learning_config(parallel), model=EXPERTS if experts else MODEL)
    with open_policy(config) as policy:
        batches = policy.pack(make_samples())
        policy.train_step(batches, PolicyLossConfig(), UpdateMetrics())
        same, metrics = True, UpdateMetrics()
        if skip:
            before, rate = state(policy), policy.learning_rate
            with spoiled(policy, part, value):
                policy.train_step(batches, PolicyLossConfig(), metrics)
            after = state(policy)
            same = len(before) == len(after) and all(map(torch.equal, before, after))
            same &= (policy.weight_version, policy.learning_rate) == (1, rate)
        policy.train_step(batches, PolicyLossConfig(), metrics)
        assert policy.weight_version == 2
        return same, metrics.reduce() | {"lr": policy.learning_rate}, state(policy)


@pytest.mark.parametrize("case", CASES)
def test_a_skipped_update_changes_nothing(case: str) -> None:
    ranks = CASES[case][0]
    expected = run(ranks, skip_one, case, False)
    for (same, metrics, tensors), (_, plain_metrics, plain_tensors) in zip(
        run(ranks, skip_one, case, True), expected, strict=True
    ):
        assert same
        assert (metrics.pop("skipped"), plain_metrics.pop("skipped")) == (1.0, 0.0)
        assert metrics == plain_metrics
        assert all(map(torch.equal, tensors, plain_tensors))


def skip_many() -> tuple[int, str]:
    """(number of updates skipped before the run ended, its error)."""
    config = learning_config(ParallelConfig(tensor=2))
    config = replace(config, optimizer=replace(config.optimizer, max_skipped_updates=2))
    with open_policy(config) as policy:
        batches = policy.pack(make_samples())
        metrics = UpdateMetrics()
        for _ in range(2):  # a single skip does not end the run
            with spoiled(policy, "linear_fc1", float("nan")):
                policy.train_step(batches, PolicyLossConfig(), metrics)
            policy.train_step(batches, PolicyLossConfig(), metrics)
        with spoiled(policy, "linear_fc1", float("nan")):
            policy.train_step(batches, PolicyLossConfig(), metrics)
            with pytest.raises(RunError) as caught:
                policy.train_step(batches, PolicyLossConfig(), metrics)
        return metrics.skipped, str(caught.value)


def test_as_many_in_a_row_as_the_setting_allows() -> None:
    for skipped, error in run(2, skip_many):
        assert skipped == 4
        assert "optimizer.max_skipped_updates=2" in error
        assert "\n" not in error
