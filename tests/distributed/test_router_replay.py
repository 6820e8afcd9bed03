"""Router replay: every pass of an update, recomputed passes included, uses the expert choices of the old log-probs'
pass, or of the sampler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import gradients_of_steps, make_samples, open_policy, run, run_config, write_weights
from test_layouts import check_updates, take_updates
from torch import Tensor

from megatron_aspo.batch import Sample
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import OptimizerConfig, TrainConfig
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.sample_log import score
from megatron_aspo.train import set_logprobs

pytestmark = pytest.mark.distributed

MODEL = replace(run_config().model, num_experts=4, moe_ffn_hidden_size=32, moe_aux_loss_coef=0.0)
REPLAY = TrainConfig(router_replay="trainer", max_tokens_per_micro_batch=100)
FULL = replace(REPLAY, recompute="full")
EXPERTS = replace(REPLAY, recompute="selective", recompute_modules=("moe",))
EP2 = ParallelConfig(expert=2)
LAYOUTS = {
    "alone": (1, ParallelConfig(), REPLAY),
    "alone, recomputed": (1, ParallelConfig(), FULL),
    "ep2, through logits": (2, EP2, replace(FULL, fused_head=False)),
    "pp2, recomputed": (2, ParallelConfig(pipeline=2), FULL),
    "pp2-ep2, experts recomputed": (4, ParallelConfig(pipeline=2, expert=2), EXPERTS),
    "tp2-ep2-sp, recomputed": (4, ParallelConfig(tensor=2, expert=2, sequence_parallel=True), FULL),
    "cp2-ep2": (2, ParallelConfig(context=2, expert=2), REPLAY),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    run(1, write_weights, folder, MODEL)
    return folder


def take_replayed(folder: Path, config: RunConfig) -> dict[Any, Any]:
    """Update the "current" weights with the routing of the "old" ones."""
    return take_updates(folder, MODEL, config.parallel, {"": (config.train, ["aspo", "gspo"])}, config=config)


@pytest.fixture(scope="module")
def reference(weights: Path) -> dict[Any, Any]:
    one = replace(REPLAY, max_tokens_per_micro_batch=1024)
    (found,) = run(1, take_replayed, weights, run_config(model=MODEL, train=one))
    return {("one stream", loss): update for (_, loss), update in found.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_replayed_update_is_the_same_at(layout: str, weights: Path, reference: dict[Any, Any]) -> None:
    ranks, parallel, train = LAYOUTS[layout]
    check_updates(run(ranks, take_replayed, weights, run_config(parallel, model=MODEL, train=train)), reference)


def test_replaying_makes_another_update(weights: Path, reference: dict[Any, Any]) -> None:
    (free,) = run(1, take_replayed, weights, run_config(model=MODEL, train=replace(REPLAY, router_replay="none")))
    for loss in ("aspo", "gspo"):
        assert abs(free["", loss][0]["log_ratio_max"] / reference["one stream", loss][0]["log_ratio_max"] - 1) > 0.01


def largest_first_ratio(config: RunConfig) -> float:
    with open_policy(config) as policy:
        batches = policy.pack(make_samples())
        set_logprobs(policy, [batches])
        metrics = UpdateMetrics()
        policy.train_step(batches, PolicyLossConfig(), metrics)
        return metrics.reduce()["log_ratio_max_first"]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_without_replay_the_first_ratio_is_one(recompute: Any) -> None:
    """Passes with and without gradients sum the weights of eight experts in one order."""
    model = replace(MODEL, num_experts=16, moe_top_k=8)
    train = replace(REPLAY, router_replay="none", recompute=recompute)
    assert run(1, largest_first_ratio, run_config(model=model, train=train)) == [0.0]


# --- Expert choices, recorded at the routers ---


def routes_of_a_step(config: RunConfig) -> dict[str, Any]:
    """Two mini-batches, an update on each and one more on the first, at a learning rate that changes the routing.

    Every pass is a list of [tokens, experts] maps, one per router in order.
    """
    with open_policy(config) as policy:
        samples = make_samples()
        first, second = policy.pack(samples[:12]), policy.pack(samples[12:])
        seen: list[tuple[bool, Tensor]] = []
        for module in policy.model.modules():
            if hasattr(module, "gating"):
                module.register_forward_hook(lambda _m, _i, out: seen.append((torch.is_grad_enabled(), out[1].clone())))

        def passes(grad: bool) -> list[Tensor]:
            return [routes for with_grad, routes in seen if with_grad == grad]

        found: dict[str, Any] = {}
        for name, batches in (("first", first), ("second", second)):
            set_logprobs(policy, [batches])
            found[f"{name}: old"] = passes(False)
            seen.clear()
        metrics = UpdateMetrics()
        for name, batches in (("first", first), ("second", second), ("first, again", first)):
            policy.train_step(batches, PolicyLossConfig(), metrics)
            found[f"{name}: forward"], found[f"{name}: with gradients"] = passes(False), passes(True)
            seen.clear()
        for name in ("second: again", "second: free"):
            set_logprobs(policy, [second])
            found[name] = passes(False)
            seen.clear()
            for batch in second:
                batch.routing = None
        return found | {"batches": len(first), "metrics": metrics.reduce()}


def moved(found: dict[str, Any], name: str, old: str) -> int:
    """Number of tokens that a pass routes differently, for any order in which its layers are recomputed."""
    pairs = zip(found[name], found[f"{old}: old"], strict=True)
    return sum(int((routes != old_routes).any(1).sum()) for routes, old_routes in pairs)


def step_config(parallel: ParallelConfig, train: TrainConfig) -> RunConfig:
    optimizer = OptimizerConfig(lr=0.05, lr_warmup_updates=0)
    return run_config(parallel, model=MODEL, train=replace(train, max_tokens_per_micro_batch=64), optimizer=optimizer)


@pytest.mark.parametrize(("ranks", "parallel"), [(1, ParallelConfig()), (2, EP2), (2, ParallelConfig(pipeline=2))])
def test_updates_take_the_old_experts(ranks: int, parallel: ParallelConfig) -> None:
    for found in run(ranks, routes_of_a_step, step_config(parallel, REPLAY)):
        assert found["batches"] > 1
        assert found["metrics"]["log_ratio_max_first"] == 0
        assert found["metrics"]["log_ratio_max"] > 0.1
        for name, old in (("first", "first"), ("second", "second"), ("first, again", "first")):
            assert found[f"{name}: forward"] == []
            assert moved(found, f"{name}: with gradients", old) == 0
        assert moved(found, "second: again", "second") == 0
        assert moved(found, "second: free", "second") > 0, "the weights have not moved far enough for this test"


def test_without_replay_updates_take_others() -> None:
    (found,) = run(1, routes_of_a_step, step_config(ParallelConfig(), replace(REPLAY, router_replay="none")))
    assert found["metrics"]["log_ratio_max_first"] < 1e-5
    assert moved(found, "first: with gradients", "first") == 0
    assert moved(found, "second: with gradients", "second") > 0
    assert moved(found, "first, again: with gradients", "first") > 0


@pytest.mark.parametrize(("ranks", "parallel"), [(1, ParallelConfig()), (2, ParallelConfig(pipeline=2))])
def test_what_is_recomputed_takes_them_too(ranks: int, parallel: ParallelConfig) -> None:
    for found in run(ranks, routes_of_a_step, step_config(parallel, FULL)):
        layers = MODEL.num_layers // parallel.pipeline
        for name, old in (("first", "first"), ("second", "second"), ("first, again", "first")):
            assert moved(found, f"{name}: forward", old) == 0
            backward = found[f"{name}: with gradients"]  # the last layer first
            found["in order"] = [r for i in range(0, len(backward), layers) for r in backward[i : i + layers][::-1]]
            assert moved(found, "in order", old) == 0


# --- The sampler's expert choices ---

DEEP = replace(MODEL, num_layers=4, init_std=0.1)
SAMPLER = replace(REPLAY, router_replay="sampler")
TP2 = ParallelConfig(tensor=2, sequence_parallel=True)
ROUTED = {
    "tp2-sp": (2, TP2, SAMPLER),
    "pp2": (2, ParallelConfig(pipeline=2), SAMPLER),
    "pp2, virtual stages": (2, ParallelConfig(pipeline=2, virtual_pipeline=2), SAMPLER),
    "cp2": (2, ParallelConfig(context=2), SAMPLER),
    "ep2, recomputed": (2, EP2, replace(SAMPLER, recompute="full")),
    "tp2-sp-pp2-ep2": (4, replace(TP2, pipeline=2, expert=2, expert_tensor=1), SAMPLER),
}


def routed_samples(shift: int = 0) -> list[Sample]:
    """Samples with random routes. They are another token's with `shift`."""
    rng = np.random.default_rng(5)
    samples = make_samples()
    for sample in samples:
        scores = rng.random((sample.length - 1, DEEP.num_layers, DEEP.num_experts))
        sample.routes = np.roll(scores.argsort(-1)[..., : DEEP.moe_top_k].astype(np.uint8), shift, 0)
    return samples


def take_routed(folder: Path, config: RunConfig, shift: int = 0) -> tuple[Tensor, dict[Any, Any]]:
    """Table of the old log-probs, and the update."""
    with open_policy(config, folder / "reference") as policy:
        gradients = gradients_of_steps(policy)
        samples = routed_samples(shift)
        batches = policy.pack(samples)
        set_logprobs(policy, [batches])
        checkpoint.load_weights(folder / "old", policy)
        table, metrics = score(policy, samples, batches)[0], UpdateMetrics()
        if len(policy.chunks) > 1:  # `full_gradients` takes one
            return table, {}
        policy.train_step(batches, PolicyLossConfig(), metrics)
        return table, {("one stream", "aspo"): (metrics.reduce(), gradients.pop())}


@pytest.fixture(scope="module")
def deep_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    run(1, write_weights, folder, DEEP)
    return folder


@pytest.fixture(scope="module")
def routed(deep_weights: Path) -> tuple[Tensor, dict[Any, Any]]:
    one = replace(SAMPLER, max_tokens_per_micro_batch=1024)
    return run(1, take_routed, deep_weights, run_config(model=DEEP, train=one))[0]


@pytest.mark.parametrize("layout", ROUTED)
def test_random_routes_give_the_log_probs_and_the_update_of_one_rank_at(
    layout: str, deep_weights: Path, routed: tuple[Tensor, dict[Any, Any]]
) -> None:
    ranks, parallel, train = ROUTED[layout]
    results = run(ranks, take_routed, deep_weights, run_config(parallel, model=DEEP, train=train))
    for table, _ in results:
        assert float((table - routed[0]).abs().max()) <= 5e-6
    check_updates([update for _, update in results], routed[1])


def test_routes_matter_token_by_token(deep_weights: Path, routed: tuple[Tensor, dict[Any, Any]]) -> None:
    config = run_config(model=DEEP, train=replace(SAMPLER, max_tokens_per_micro_batch=1024))
    ((shifted, _),) = run(1, take_routed, deep_weights, config, 1)
    ((free, _),) = run(1, take_routed, deep_weights, replace(config, train=replace(config.train, router_replay="none")))
    for other in (shifted, free):
        assert (other - routed[0]).abs().mean() > 0.1


def anchored_updates(folder: Path, config: RunConfig) -> list[dict[str, Tensor]]:
    """Gradients of an update of the ratio to the sampler: without a pass before, after one, and without routes."""
    with open_policy(config, folder / "current") as policy:
        gradients = gradients_of_steps(policy)
        for with_pass, with_routes in ((False, True), (True, True), (False, False)):
            batches = policy.pack(routed_samples() if with_routes else make_samples())
            if with_pass:
                set_logprobs(policy, [batches])
            policy.train_step(batches, PolicyLossConfig(anchor="rollout"), UpdateMetrics())
        return gradients


def test_the_sampler_s_routes_need_no_pass_before_the_update(deep_weights: Path) -> None:
    (found,) = run(1, anchored_updates, deep_weights, run_config(model=DEEP, train=replace(SAMPLER, recompute="full")))
    alone, after_a_pass, free = found
    assert all(torch.equal(alone[name], after_a_pass[name]) for name in alone)
    assert not all(torch.equal(alone[name], free[name]) for name in alone)
    assert sum(float(gradient.abs().sum()) for gradient in alone.values()) > 1
