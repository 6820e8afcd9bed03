"""What saves memory changes no update: recomputed activations, uneven stages, experts parted otherwise, released
gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from ranks import VOCAB, gradients_of_steps, make_samples, run, run_config, write_weights
from torch import Tensor

from megatron_aspo.config import ModelConfig, OptimizerConfig, ParallelConfig, PolicyLossConfig, RunConfig, TrainConfig
from megatron_aspo.distributed import distributed
from megatron_aspo.errors import UserError
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.trainer import Policy, UpdateMetrics, _offload_settings

pytestmark = pytest.mark.distributed

DENSE = replace(run_config().model, num_layers=4)
EXPERTS = replace(DENSE, num_layers=2, num_experts=4, moe_ffn_hidden_size=32, moe_aux_loss_coef=0.0)
TRAIN = TrainConfig(max_tokens_per_micro_batch=100)


def train(**settings: Any) -> RunConfig:
    return run_config(model=DENSE, train=replace(TRAIN, **settings))


def parallel(model: ModelConfig = DENSE, **settings: Any) -> RunConfig:
    return run_config(ParallelConfig(**settings), model=model, train=TRAIN)


CASES: dict[str, tuple[int, RunConfig]] = {
    "recompute all layers": (1, train(recompute="full")),
    "recompute two layers at a time": (1, train(recompute="full", recompute_layers=2)),
    "recompute the first three layers": (1, train(recompute="full", recompute_method="block", recompute_layers=3)),
    "recompute mlp": (1, train(recompute="selective", recompute_modules=("mlp",))),
    "recompute mlp and core_attn": (1, train(recompute="selective", recompute_modules=("mlp", "core_attn"))),
    "release gradients": (1, train(release_gradients=True)),
    "release gradients, tp2": (
        2,
        replace(train(release_gradients=True), parallel=ParallelConfig(tensor=2, sequence_parallel=True)),
    ),
    "recompute, tp2-sp": (
        2,
        replace(train(recompute="full"), parallel=ParallelConfig(tensor=2, sequence_parallel=True)),
    ),
    "overlapped reduction, dp2": (2, parallel(overlap_grad_reduce=True)),
    "overlapped reduction, pp2": (2, parallel(overlap_grad_reduce=True, pipeline=2)),
    "stages of 1 and 3 layers": (2, parallel(pipeline=2, first_stage_layers=1)),
    "stages of 3 and 1 layers": (2, parallel(pipeline=2, last_stage_layers=1)),
    "stages of 1, 2 and 1 layers": (3, parallel(pipeline=3, first_stage_layers=1, last_stage_layers=1)),
    "recompute experts": (
        1,
        run_config(model=EXPERTS, train=replace(TRAIN, recompute="selective", recompute_modules=("moe",))),
    ),
    "whole experts beside tp2": (
        2,
        parallel(EXPERTS, tensor=2, sequence_parallel=True, expert=2, expert_tensor=1),
    ),
    "whole experts beside dp2-tp2": (
        4,
        parallel(EXPERTS, tensor=2, sequence_parallel=True, expert=4, expert_tensor=1),
    ),
    "whole experts beside tp2-cp2": (
        4,
        parallel(EXPERTS, tensor=2, sequence_parallel=True, context=2, expert=2, expert_tensor=1),
    ),
}


def two_updates(folder: Path, config: RunConfig) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
    """Metrics and gradients of whole parameters of two updates from the same weights."""
    with distributed(config):
        policy = Policy(config, VOCAB)
        checkpoint.load_weights(folder / "old", policy)
        batches = policy.pack(make_samples())
        policy.fill_logprobs(batches, "old_logprobs")
        checkpoint.load_weights(folder / "current", policy)
        gradients = gradients_of_steps(policy)
        metrics = UpdateMetrics()
        for _ in range(2):
            policy.train_step(batches, PolicyLossConfig(), metrics)
            policy.release_gradients()
        return metrics.reduce(), gradients


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Weights of the dense model, and of the one with experts."""
    folders: dict[int, Path] = {}
    for model in (DENSE, EXPERTS):
        folders[model.num_experts] = tmp_path_factory.mktemp("weights")
        run(1, write_weights, folders[model.num_experts], model)
    return folders


@pytest.fixture(scope="module")
def expected(weights: dict[int, Path]) -> dict[int, Any]:
    return {
        model.num_experts: run(1, two_updates, weights[model.num_experts], run_config(model=model, train=TRAIN))[0]
        for model in (DENSE, EXPERTS)
    }


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_that_without(case: str, weights: dict[int, Path], expected: dict[int, Any]) -> None:
    ranks, config = CASES[case]
    expected_metrics, expected_gradients = expected[config.model.num_experts]
    for metrics, gradients in run(ranks, two_updates, weights[config.model.num_experts], config):
        assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)
        for found, wanted in zip(gradients, expected_gradients, strict=True):
            assert found.keys() == wanted.keys()
            for name, gradient in wanted.items():
                error = float((found[name] - gradient).abs().max() / gradient.abs().max())
                assert error < (1e-6 if ranks == 1 else 1e-5), f"{name} is off by {error:.1e} of its largest gradient"


def released_bytes(config: RunConfig) -> list[int]:
    """Of the gradients' buffers: after an update, after the release, after the next update."""
    with distributed(config):
        policy = Policy(config, VOCAB)
        batches = policy.pack(make_samples())
        policy.fill_logprobs(batches, "old_logprobs")
        sizes: list[int] = []

        def look() -> None:
            sizes.append(sum(b.grad_data.untyped_storage().nbytes() for b in policy.model.buffers))

        policy.train_step(batches, PolicyLossConfig(), UpdateMetrics())
        look()
        policy.release_gradients()
        look()
        policy.train_step(batches, PolicyLossConfig(), UpdateMetrics())
        look()
        return sizes


def test_released_gradients_take_nothing() -> None:
    ((before, released, after),) = run(1, released_bytes, train(release_gradients=True))
    assert before == after > 0
    assert released == 0


def refusal(config: RunConfig) -> str:
    with distributed(config), pytest.raises(UserError) as caught:
        Policy(config, VOCAB)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": OptimizerConfig(cpu_offload=0.5)}, "optimizer.cpu_offload=0.5 needs a GPU"),
        ({"optimizer": OptimizerConfig(moments_dtype="bfloat16")}, "needs Transformer Engine's optimizer"),
        (
            {"train": TrainConfig(recompute="selective", recompute_modules=("mlp", "layernorm"))},
            "train.recompute_modules=['layernorm'] needs Transformer Engine",
        ),
    ],
)
def test_what_only_a_gpu_can_do_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    (found,) = run(1, refusal, run_config(model=replace(DENSE, dtype="bfloat16"), **settings))
    assert message in found
    assert "\n" not in found


def offload_settings() -> Any:
    settings = _offload_settings(OptimizerConfig(cpu_offload=0.5), on_gpu=True)
    return MegatronOptimizerConfig(optimizer="adam", bf16=True, use_distributed_optimizer=True, **settings)


def test_offloading_is_what_megatron_takes() -> None:
    (found,) = run(1, offload_settings)
    assert (found.optimizer_cpu_offload, found.optimizer_offload_fraction) == (True, 0.5)
    assert found.use_precision_aware_optimizer_no_fp8_or_ds_fp8
