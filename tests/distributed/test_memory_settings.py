"""Memory-saving settings change no update: recomputation, uneven stages, expert layouts, released gradients."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from ranks import gradients_of_steps, make_samples, open_policy, refusal, run, run_config, write_weights
from torch import Tensor

from benchmarks.counting import Count
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import OptimizerConfig, TrainConfig
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.optimizer import offload_settings
from megatron_aspo.train import set_logprobs

pytestmark = pytest.mark.distributed

DENSE = replace(run_config().model, num_layers=4)
EXPERTS = replace(DENSE, num_layers=2, num_experts=4, moe_ffn_hidden_size=32, moe_aux_loss_coef=0.0)
TRAIN = TrainConfig(max_tokens_per_micro_batch=100)


TP2 = ParallelConfig(tensor=2, sequence_parallel=True)


def train(layout: ParallelConfig | None = None, model: ModelConfig = DENSE, **settings: Any) -> RunConfig:
    return run_config(layout, model=model, train=replace(TRAIN, **settings))


def parallel(**settings: Any) -> RunConfig:
    return train(ParallelConfig(**settings))


CASES: dict[str, tuple[int, RunConfig]] = {
    "recompute all layers": (1, train(recompute="full")),
    "recompute two layers at a time": (1, train(recompute="full", recompute_layers=2)),
    "recompute the first three layers": (1, train(recompute="full", recompute_method="block", recompute_layers=3)),
    "recompute selectively": (1, train(recompute="selective")),
    "recompute mlp": (1, train(recompute="selective", recompute_modules=("mlp",))),
    "recompute mlp and core_attn": (1, train(recompute="selective", recompute_modules=("mlp", "core_attn"))),
    "release gradients": (1, train(release_gradients=True)),
    "release gradients, tp2": (2, train(TP2, release_gradients=True)),
    "recompute, tp2-sp": (2, train(TP2, recompute="full")),
    "overlapped reduction, dp2": (2, parallel(overlap_grad_reduce=True)),
    "overlapped reduction, pp2": (2, parallel(overlap_grad_reduce=True, pipeline=2)),
    "stages of 1 and 3 layers": (2, parallel(pipeline=2, first_stage_layers=1)),
    "stages of 3 and 1 layers": (2, parallel(pipeline=2, last_stage_layers=1)),
    "stages of 1, 2 and 1 layers": (3, parallel(pipeline=3, first_stage_layers=1, last_stage_layers=1)),
    "recompute experts": (1, train(model=EXPERTS, recompute="selective", recompute_modules=("moe",))),
    "whole experts beside tp2": (2, train(replace(TP2, expert=2, expert_tensor=1), EXPERTS)),
    "whole experts beside dp2-tp2": (4, train(replace(TP2, expert=4, expert_tensor=1), EXPERTS)),
    "whole experts beside tp2-cp2": (4, train(replace(TP2, context=2, expert=2, expert_tensor=1), EXPERTS)),
}


def two_updates(folder: Path, config: RunConfig) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
    """Metrics and full gradients of two updates from the same weights."""
    with open_policy(config, folder / "old") as policy:
        batches = policy.pack(make_samples())
        set_logprobs(policy, [batches])
        checkpoint.load_weights(folder / "current", policy)
        gradients = gradients_of_steps(policy)
        metrics = UpdateMetrics()
        for _ in range(2):
            policy.train_step(batches, PolicyLossConfig(), metrics)
            policy.release_gradients()
        return metrics.reduce(), gradients


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Weights of the dense model and of the mixture of experts."""
    folders: dict[int, Path] = {}
    for model in (DENSE, EXPERTS):
        folders[model.num_experts] = tmp_path_factory.mktemp("weights")
        run(1, write_weights, folders[model.num_experts], model)
    return folders


@pytest.fixture(scope="module")
def expected(weights: dict[int, Path]) -> dict[int, Any]:
    models = {model.num_experts: model for model in (DENSE, EXPERTS)}
    return {n: run(1, two_updates, weights[n], train(model=model))[0] for n, model in models.items()}


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
    """Bytes of the gradient buffers after an update, after their release, and after the next update."""
    with open_policy(config) as policy:
        batches = policy.pack(make_samples())
        set_logprobs(policy, [batches])
        sizes: list[int] = []
        update = partial(policy.train_step, batches, PolicyLossConfig(), UpdateMetrics())
        for action in (update, policy.release_gradients, update):
            action()
            sizes.append(sum(b.grad_data.untyped_storage().nbytes() for b in policy.model.buffers))
        return sizes


def test_released_gradients_take_nothing() -> None:
    ((before, released, after),) = run(1, released_bytes, train(release_gradients=True))
    assert before == after > 0
    assert released == 0


def kept_rotary_tables(config: RunConfig) -> list[int]:
    """Megatron's tables of angles after passes over ever more samples, whose longest lengths differ."""
    cached: Any = RotaryEmbedding.forward
    counts: list[int] = []
    with open_policy(config) as policy:
        samples = sorted(make_samples(), key=lambda sample: sample.length)
        for count in (1, len(samples) // 2, len(samples)):
            set_logprobs(policy, [policy.pack(samples[:count])])
            counts.append(cached.cache_info().currsize)
        return counts


def test_no_pass_leaves_rotary_tables() -> None:
    (counts,) = run(1, kept_rotary_tables, train())
    assert counts == [0, 0, 0]


def bytes_left_by_an_update(config: RunConfig) -> int:
    with open_policy(config) as policy:
        batches = policy.pack(make_samples())
        policy.train_step(batches, PolicyLossConfig(), UpdateMetrics())  # creates the optimizer's states
        with Count() as count:
            policy.train_step(batches, PolicyLossConfig(), UpdateMetrics())
            gc.collect()
        return count.live


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_an_update_of_experts_leaves_no_tensor_behind(recompute: Literal["none", "full"]) -> None:
    (left,) = run(1, bytes_left_by_an_update, train(model=EXPERTS, recompute=recompute))
    assert left < 128  # tokens by expert of two layers, and one step of Adam


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


def test_masters_beside_bfloat16_moments_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's default (int16 remainders instead of float32 masters) can be saved but not loaded."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "transformer_engine")
    settings = offload_settings(OptimizerConfig(moments_dtype="bfloat16"), on_gpu=True)
    fields = {field.name for field in dataclasses.fields(MegatronOptimizerConfig)}
    assert settings.keys() <= fields
    assert (settings["exp_avg_dtype"], settings["store_param_remainders"]) == (torch.bfloat16, False)


def megatron_settings() -> Any:
    settings = offload_settings(OptimizerConfig(cpu_offload=0.5), on_gpu=True)
    return MegatronOptimizerConfig(optimizer="adam", bf16=True, use_distributed_optimizer=True, **settings)


def test_offloading_is_what_megatron_takes() -> None:
    (found,) = run(1, megatron_settings)
    assert (found.optimizer_cpu_offload, found.optimizer_offload_fraction) == (True, 0.5)
    assert found.use_precision_aware_optimizer_no_fp8_or_ds_fp8
