"""Policies that train with Transformer Engine's own FP8, on kernels in torch operations; and its optimizer.

Whole models are compared by what they compute, because one rounding that differs spreads. Tensors and layers are
compared to the bit in test_te_fp8_rules.py.
"""

from __future__ import annotations

import math
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import te_ranks
import torch
from ranks import full_gradients, make_samples, open_policy, run, run_config
from te_ranks import needs_te
from test_te_fp8_rules import DENSE, EXPERTS, capability, count_differences, fp8
from test_te_layers import LATENT, build_with, exact_layers
from torch import Tensor

from megatron_aspo.config.fp8 import Fp8Config
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import OptimizerConfig, TrainConfig
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.train import set_logprobs, update

pytestmark = [pytest.mark.distributed, pytest.mark.slow, needs_te]


def fp8_config(
    recipe: str | None, parallel: ParallelConfig | None = None, train: TrainConfig | None = None, **sections: Any
) -> RunConfig:
    defaults: dict[str, Any] = {
        "model": DENSE,
        "fp8": fp8(recipe) if recipe else Fp8Config(),
        "optimizer": OptimizerConfig(lr=1e-4, lr_warmup_updates=0),
        "train": train or TrainConfig(max_tokens_per_micro_batch=256),
    }
    return run_config(parallel, **(defaults | sections))


def take_step(policy: Policy, first: int) -> dict[str, float]:
    """Metrics of a step of one update per mini-batch on 8 samples, and the mean of the old log-probs."""
    batches = policy.pack(make_samples()[first : first + 8])
    set_logprobs(policy, [batches])
    both = torch.zeros(2)
    for batch in batches:
        if batch.old_logprobs is not None:
            both += torch.stack([batch.old_logprobs[batch.loss_mask].sum(), batch.loss_mask.sum()])
    torch.distributed.all_reduce(both)
    return update(policy, [batches], policy.config.train, policy.config.loss) | {"old": float(both[0] / both[1])}


def two_steps(folder: Path, config: RunConfig) -> list[dict[str, float]]:
    """Two steps, with a checkpoint between them."""
    with open_policy(config) as policy:
        first = take_step(policy, 0)
        checkpoint.save(folder, 1, policy, {})
        return [first, take_step(policy, 8)]


def second_step(folder: Path, config: RunConfig) -> dict[str, float]:
    """The second step, from the checkpoint."""
    with open_policy(config) as policy:
        with redirect_stderr(StringIO()) as said:
            checkpoint.load(folder / "step_000001", policy)
        assert "scales" not in said.getvalue()
        return take_step(policy, 8)


FULL = TrainConfig(max_tokens_per_micro_batch=256, recompute="full")
SELECTIVE = replace(FULL, recompute="selective", recompute_modules=("layernorm", "mlp"))
TP2 = ParallelConfig(tensor=2, sequence_parallel=True)
SHORT = replace(FULL, max_tokens_per_micro_batch=64)
LAYOUTS: dict[str, tuple[Fp8Config, ModelConfig, ParallelConfig, TrainConfig]] = {
    "none": (Fp8Config(), DENSE, TP2, FULL),
    "delayed": (fp8("delayed"), DENSE, TP2, replace(SHORT, recompute="none")),
    # With recomputation the history moves on twice in a pass, so only its newest value is the same.
    "delayed, recomputed": (Fp8Config(recipe="delayed"), DENSE, ParallelConfig(pipeline=2), SHORT),
    "current": (fp8("current"), DENSE, ParallelConfig(context=2), SELECTIVE),
    "blockwise, experts": (
        fp8("blockwise"),
        EXPERTS,
        ParallelConfig(expert=2),
        replace(SELECTIVE, recompute_modules=("moe", "layernorm")),
    ),
    "mxfp8": (fp8("mxfp8"), DENSE, ParallelConfig(pipeline=2), SELECTIVE),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_training_resuming_and_resharding(case: str, tmp_path: Path) -> None:
    """Log r = 0 before the first update where scales depend on the tensor alone. With delayed scaling the update's
    first micro-batch takes the scales of the old log-probs, and changes them for the others. A resumed step has the
    same bits, recomputed or not; at another layout roundings differ."""
    fp8, model, parallel, train = LAYOUTS[case]
    plain = replace(train, recompute="none", recompute_modules=())
    gpu, is_delayed = capability(fp8.recipe), fp8.recipe == "delayed"
    config = fp8_config(fp8.recipe, train=plain, model=model, fp8=fp8)
    (steps,) = te_ranks.run(1, two_steps, tmp_path, config, capability=gpu)
    for metrics in steps:
        first = metrics["loss/log_ratio_max_first"]
        assert first > 1e-3 if is_delayed else first == 0
    assert steps[0]["optimizer/grad_norm"] > 0
    for variant in (plain, train):
        (again,) = te_ranks.run(1, second_step, tmp_path, replace(config, train=variant), capability=gpu)
        assert again == steps[1], variant.recompute
    resharded = replace(config, parallel=parallel, train=train)
    for found in te_ranks.run(2, second_step, tmp_path, resharded, capability=gpu):
        assert found["old"] == pytest.approx(steps[1]["old"], abs=0.1)
        assert found["optimizer/grad_norm"] == pytest.approx(steps[1]["optimizer/grad_norm"], rel=0.1)
        first = found["loss/log_ratio_max_first"]
        assert first > 1e-3 if is_delayed else first == 0


WIDE_LATENT = LATENT | {
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_head_dim": 64,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 64,
    "moe_shared_expert_intermediate_size": 256,
}
CP2 = ParallelConfig(context=2)
STEPS: dict[str, tuple[str, ModelConfig, ParallelConfig, dict[str, Any]]] = {
    "latent, blockwise": ("blockwise", EXPERTS, ParallelConfig(), WIDE_LATENT),
    "latent, current": ("current", EXPERTS, ParallelConfig(), WIDE_LATENT),
    "cp2, mxfp8": ("mxfp8", DENSE, CP2, {}),
    "cp2, delayed": ("delayed", DENSE, CP2, {}),
    "experts, ep2, mxfp8": ("mxfp8", EXPERTS, ParallelConfig(expert=2), {}),
}


def step_by_rules(config: RunConfig, settings: dict[str, Any]) -> tuple[dict[str, float], dict[str, int], list[float]]:
    """Metrics of a step, counts of what it quantized, and the scales of delayed scaling at its end."""
    assert config.fp8.recipe is not None
    counts = count_differences(config.fp8.recipe)
    build_with(settings)
    with open_policy(config) as policy:
        metrics = take_step(policy, 0)
        states = [m.fp8_meta["scaling_fwd"] for m in policy.model.modules() if hasattr(m, "fp8_meta")]
        return metrics, counts, [s for state in states for s in getattr(state, "scale", torch.empty(0)).tolist()]


@pytest.mark.parametrize("case", STEPS)
def test_a_step_rounds_by_the_rules(case: str) -> None:
    """Every tensor of old log-probs and updates; ranks of a context share the scales of delayed scaling."""
    recipe, model, parallel, settings = STEPS[case]
    train = TrainConfig(max_tokens_per_micro_batch=max(64, fp8(recipe).multiple))
    config = fp8_config(recipe, parallel, train, model=replace(model, num_layers=1))
    size = parallel.model_parallel_size
    found = te_ranks.run(size, step_by_rules, config, settings, capability=capability(recipe))
    for metrics, counts, scales in found:
        assert all(map(math.isfinite, metrics.values())), metrics
        first = metrics["loss/log_ratio_max_first"]
        assert first > 1e-3 if recipe == "delayed" else first == 0
        assert metrics["optimizer/grad_norm"] > 0
        assert counts["tensors"] > 40
        assert counts["different"] == 0
        assert scales == found[0][2]
        assert (len(set(scales)) > 4) == (recipe == "delayed")


def test_recomputation_moves_the_history_on_twice(tmp_path: Path) -> None:
    """By Transformer Engine's design, of which the configuration warns."""
    config = fp8_config("delayed", train=replace(SHORT, recompute="none"))
    (steps,) = te_ranks.run(1, two_steps, tmp_path, config)
    (recomputed,) = te_ranks.run(1, second_step, tmp_path, replace(config, train=SHORT))
    assert recomputed["old"] == steps[1]["old"]
    assert recomputed["optimizer/grad_norm"] != steps[1]["optimizer/grad_norm"]


def logprobs_and_gradients(path: Path, config: RunConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Old log-probs of all response tokens (of the last stage) and gradients of an update, in float32."""
    exact_layers()
    with open_policy(config, path) as policy:
        batches = policy.pack(make_samples())
        set_logprobs(policy, [batches])
        policy.train_step(batches, PolicyLossConfig(), UpdateMetrics())
        found = [b.old_logprobs[b.loss_mask] for b in batches if b.old_logprobs is not None]
        return torch.cat([*found, torch.empty(0)]), full_gradients(policy)


def test_blocks_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    """If every rank holds whole blocks, layouts differ by the order of sums, which rarely changes an FP8 code
    downstream."""
    exact = fp8_config(None, model=replace(DENSE, dtype="float32"), train=TrainConfig(max_tokens_per_micro_batch=1024))
    path, in_blocks = tmp_path / "weights", replace(exact, fp8=Fp8Config(recipe="blockwise"))
    run(1, save_weights, path, exact)
    (without,) = te_ranks.run(1, logprobs_and_gradients, path, exact)
    (alone,) = te_ranks.run(1, logprobs_and_gradients, path, in_blocks)
    for parallel in (TP2, ParallelConfig(pipeline=2)):
        found = te_ranks.run(2, logprobs_and_gradients, path, replace(in_blocks, parallel=parallel))[-1]
        of_layout, of_fp8 = (float((x[0] - alone[0]).abs().mean()) for x in (found, without))
        assert of_fp8 > 0.005
        assert of_layout < of_fp8 / 20
        for name, gradient in alone[1].items():
            of_layout, of_fp8 = (float((x[1][name] - gradient).norm() / gradient.norm()) for x in (found, without))
            assert of_fp8 > 0.005, name
            assert of_layout < of_fp8 / 3, name


def save_weights(path: Path, config: RunConfig) -> None:
    with open_policy(config) as policy:
        checkpoint.save_weights(path, policy)


def warnings_of_loading(path: Path, config: RunConfig) -> str:
    with open_policy(config) as policy, redirect_stderr(StringIO()) as said:
        checkpoint.load_weights(path, policy)
    return said.getvalue()


def test_scales_that_a_checkpoint_lacks(tmp_path: Path) -> None:
    """Local layers write none."""
    run(1, save_weights, tmp_path / "weights", fp8_config(None))
    for recipe, named in ((None, False), ("current", False), ("delayed", True)):
        (said,) = te_ranks.run(1, warnings_of_loading, tmp_path / "weights", fp8_config(recipe))
        assert ("scales of fp8.recipe=delayed" in said) == named
        assert said.count("\n") == named


def test_resuming_bfloat16_moments(tmp_path: Path) -> None:
    """FusedAdam keeps its moments in bfloat16 and its own float32 weights."""
    optimizer = OptimizerConfig(lr=1e-3, lr_warmup_updates=0, moments_dtype="bfloat16")
    config = fp8_config(None, optimizer=optimizer)
    (steps,) = te_ranks.run(1, two_steps, tmp_path, config)
    (exact,) = te_ranks.run(1, second_step, tmp_path, config)
    assert exact == steps[1]
    for found in te_ranks.run(2, second_step, tmp_path, replace(config, parallel=TP2)):
        assert found["old"] == pytest.approx(steps[1]["old"], abs=0.01)


def reference_and_back(config: RunConfig) -> tuple[float, float, float]:
    """Largest differences of log-probs: of the reference and of the policy it was made from, of the policy before and
    after a look at the reference, and of the policy and the reference."""
    with open_policy(config) as policy:
        batches = policy.pack(make_samples())
        at_start = policy.logprobs(batches)
        policy.keep_reference()
        set_logprobs(policy, [batches])
        policy.train_step(batches, PolicyLossConfig(), UpdateMetrics())
        before = policy.logprobs(batches)
        with policy.reference_weights():
            reference = policy.logprobs(batches)
        after = policy.logprobs(batches)

        def largest(a: list[Tensor], b: list[Tensor]) -> float:
            return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))

        return largest(reference, at_start), largest(before, after), largest(before, reference)


@pytest.mark.parametrize("recipe", [None, "current", "blockwise", "mxfp8"])
def test_reference_weights(recipe: str | None) -> None:
    """No quantized copy of a weight outlives the exchange."""
    optimizer = OptimizerConfig(lr=1e-3, lr_warmup_updates=0)
    config = fp8_config(recipe, optimizer=optimizer)
    (found,) = te_ranks.run(1, reference_and_back, config, capability=capability(recipe))
    assert found[:2] == (0, 0)
    assert found[2] > 0.01


def scales_after_a_pass(config: RunConfig) -> list[float]:
    """Scales of the first layer's input: before and after an update, and after the update that follows a pass without
    gradients on activations ten times as large."""
    with open_policy(config) as policy:
        batches = policy.pack(make_samples()[:8])  # one micro-batch
        (linear,) = (m for n, m in policy.model.named_modules() if n.endswith("layers.0.self_attention.linear_qkv"))

        def scale() -> float:
            return float(linear.fp8_meta["scaling_fwd"].scale[0])

        def train() -> float:
            policy.train_step(batches, PolicyLossConfig(), UpdateMetrics())
            return scale()

        set_logprobs(policy, [batches])
        scales = [scale(), train(), train()]
        with torch.no_grad():
            linear.layer_norm_weight.mul_(10)
            policy.logprobs(batches)
            linear.layer_norm_weight.div_(10)
        return [*scales, train()]


def test_delayed_scales_see_passes_without_gradients() -> None:
    """Passes of log-probs use the scales, and their largest values enter the history with the next update's."""
    (scales,) = te_ranks.run(1, scales_after_a_pass, fp8_config("delayed", fp8=Fp8Config(recipe="delayed")))
    assert scales[0] == 1
    assert scales[2] == pytest.approx(scales[1], rel=0.05)
    assert scales[3] == pytest.approx(scales[2] / 10, rel=0.05)


class OnHost(torch.Tensor):
    """A tensor that Megatron has moved to the host, and what is made of it."""

    is_cuda = False  # type: ignore[assignment]


def offload_from_cpu() -> None:
    """Let Megatron's optimizers take this CPU's tensors for a GPU's, save those that they have pinned."""
    callers = ("transformer_engine", "megatron.core.optimizer.cpu_offloading", "megatron_aspo.policy.optimizer")
    setattr(torch.Tensor, "pin_memory", lambda self: self.as_subclass(OnHost))  # noqa: B010
    on_gpu = property(lambda self: sys._getframe(1).f_globals["__name__"].startswith(callers))
    setattr(torch.Tensor, "is_cuda", on_gpu)  # noqa: B010
    # It asks for the GPU's stream.
    setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)  # noqa: B010


def offloaded_steps(folder: Path, config: RunConfig, resumes: bool) -> tuple[list[dict[str, float]], list[int]]:
    """Metrics of the second and third step, from a checkpoint or without a break; and the steps that each part of the
    optimizer has counted, the GPU's first."""
    offload_from_cpu()
    with open_policy(config) as policy:
        if resumes:
            checkpoint.load(folder / "step_000001", policy)
        else:
            take_step(policy, 0)
            checkpoint.save(folder, 1, policy, {})
        found = [take_step(policy, 8), take_step(policy, 0)]
        (hybrid,) = (o.optimizer for o in policy.optimizer.chained_optimizers)
        steps = [group["step"] for group in hybrid.gpu_optimizer.param_groups] if hybrid.gpu_optimizer else []
        return found, [*steps, *(int(s["step"]) for o in hybrid.cpu_optimizers for s in o.state.values())]


def test_resuming_an_offloaded_optimizer(tmp_path: Path) -> None:
    """A part of Adam's states, or all, in host memory: to the bit, and at another share as far as two kernels of Adam
    round alike."""
    runs: dict[float, Any] = {}
    for share in (0.5, 1.0):
        optimizer = OptimizerConfig(lr=1e-3, lr_warmup_updates=0, cpu_offload=share)
        config = fp8_config(None, optimizer=optimizer)
        (runs[share],) = te_ranks.run(1, offloaded_steps, tmp_path / str(share), config, False)
        (again,) = te_ranks.run(1, offloaded_steps, tmp_path / str(share), config, True)
        assert again == runs[share]
        assert len(again[1]) > 3
        assert set(again[1]) == {3 * config.train.epochs}
    config = replace(config, optimizer=replace(optimizer, cpu_offload=0.5))
    ((metrics, steps),) = te_ranks.run(1, offloaded_steps, tmp_path / "1.0", config, True)
    assert set(steps) == {3 * config.train.epochs}
    expected = runs[1.0][0]
    assert metrics[0]["old"] == expected[0]["old"]  # the same weights
    assert metrics[1]["old"] == pytest.approx(expected[1]["old"], abs=0.01)  # in bfloat16, after three updates
