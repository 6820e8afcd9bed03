"""Mixtures of experts: the update does not depend on the expert layout, and router losses have their configured
strength."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import VOCAB, assign, full_gradients, full_tensors, open_policy, run, run_config, write_weights
from test_layouts import ARRANGEMENTS, REFERENCE, check_updates, take_updates
from test_resume import learn, learning_config
from test_sampler import ROLLOUT, generate, logprobs_of, make_prompts, tokens_of
from torch import Tensor

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.model import model_inputs
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed

pytestmark = pytest.mark.distributed

MODEL = replace(run_config().model, num_experts=4, moe_ffn_hidden_size=32, moe_aux_loss_coef=0.0)
BALANCED = replace(MODEL, moe_aux_loss_coef=0.2, moe_z_loss_coef=0.01)
LAYOUTS = {
    "ep2": (2, ParallelConfig(expert=2)),
    "ep4": (4, ParallelConfig(expert=4)),
    "dp2-ep2": (4, ParallelConfig(expert=2)),
    "cp2-ep2": (2, ParallelConfig(context=2, expert=2)),
    "pp2-ep2": (4, ParallelConfig(pipeline=2, expert=2)),
    "tp2-sp": (2, ParallelConfig(tensor=2, sequence_parallel=True)),
    "tp2-ep2-sp": (4, ParallelConfig(tensor=2, expert=2, sequence_parallel=True)),
}
LOSSES = ["aspo", "aspo, mean of means", "gspo"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    run(1, write_weights, folder, MODEL)
    return folder


@pytest.fixture(scope="module")
def reference(weights: Path) -> dict[Any, Any]:
    return run(1, take_updates, weights, MODEL, ParallelConfig(), REFERENCE)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_is_the_same_at(layout: str, weights: Path, reference: dict[Any, Any]) -> None:
    ranks, parallel = LAYOUTS[layout]
    arrangements = {name: (train, LOSSES[:2]) for name, (train, _) in ARRANGEMENTS.items()}
    check_updates(run(ranks, take_updates, weights, MODEL, parallel, arrangements), reference)


def test_an_update_with_router_losses_is_the_same_with_experts_spread(weights: Path) -> None:
    """The load-balancing loss depends on the micro-batch, so both layouts use the same micro-batches here."""
    for train, _ in ARRANGEMENTS.values():
        arrangement = {"one stream": (train, LOSSES)}
        (together, _) = run(2, take_updates, weights, BALANCED, ParallelConfig(), arrangement)
        check_updates(run(2, take_updates, weights, BALANCED, ParallelConfig(expert=2), arrangement), together)


# --- The strength of the router's losses ---

VARIANTS = {
    "token-mean": (PolicyLossConfig(), False),
    "token-mean, half the mask": (PolicyLossConfig(), True),
    "seq-mean-token-mean": (PolicyLossConfig(aggregation="seq-mean-token-mean"), False),
    "seq-mean-token-mean, half the mask": (PolicyLossConfig(aggregation="seq-mean-token-mean"), True),
    "seq-mean-token-sum": (PolicyLossConfig(aggregation="seq-mean-token-sum"), False),
}


def samples_without_signal() -> list[Sample]:
    """24 samples of 8 tokens, so that no layout pads, all with advantage 0; four have no response."""
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    for i in range(24):
        tokens = tuple(rng.integers(VOCAB, size=8).tolist())
        answer = 8 if i % 6 == 5 else 3
        samples.append(Sample(Prompt(i, "", tokens[:answer], {}), i // 4, np.array(tokens[answer:]), "stop"))
    return samples


def config_of_rows(parallel: ParallelConfig, model: ModelConfig) -> RunConfig:
    return run_config(parallel, model=model, train=TrainConfig(packing=False, max_tokens_per_micro_batch=64))


def gradients_of_updates(weights: Path, parallel: ParallelConfig) -> dict[str, dict[str, Tensor]]:
    """Map variants to gradients by name, for an update whose policy gradient is 0."""
    config = config_of_rows(parallel, BALANCED)
    found: dict[str, dict[str, Tensor]] = {}
    with open_policy(config, weights / "current") as policy:
        step = policy.optimizer.step

        def look(name: str) -> Any:
            found[name] = full_gradients(policy)
            return step()

        for name, (loss, half) in VARIANTS.items():
            batches = policy.pack(samples_without_signal())
            for batch in batches if half else []:
                batch.loss_mask &= batch.position_ids % 2 == 0
                batch.loss_positions = batch.loss_mask.nonzero()[:, 0]
            policy.optimizer.step = partial(look, name)
            policy.train_step(batches, loss, UpdateMetrics())
    return found


def plain_gradients(weights: Path, model: ModelConfig) -> dict[str, Tensor]:
    """Gradients from the definition of the router losses: means over all tokens, prompts included, summed over
    layers. A micro-batch's load-balancing loss is weighted by its number of tokens."""
    config = config_of_rows(ParallelConfig(), model)
    with open_policy(config, weights / "current") as policy:
        policy.model.eval()  # turns off the losses that Megatron adds itself
        seen: list[Tensor] = []

        def watched(gating: Any, hidden: Tensor) -> Tensor:
            seen.append(gating(hidden))
            return seen[-1]

        for module in policy.model.modules():
            if hasattr(module, "gating"):
                module.gating = partial(watched, module.gating)
        total, tokens = torch.zeros(()), 0
        for batch in policy.pack(samples_without_signal()):
            seen.clear()
            policy.model(**model_inputs(batch))
            assert len(seen) == model.num_layers
            for layer in seen:
                logits = layer.view(-1, model.num_experts)
                p = logits.softmax(-1)
                chosen = torch.zeros_like(p).scatter(1, p.topk(model.moe_top_k).indices, 1.0)
                balance = model.num_experts * (chosen.mean(0) / model.moe_top_k * p.mean(0)).sum()
                z = logits.logsumexp(-1).square().mean()
                total = total + len(p) * (model.moe_aux_loss_coef * balance + model.moe_z_loss_coef * z)
            tokens += batch.tokens.numel()
        parameters = list(policy.model.parameters())
        gradients = torch.autograd.grad(total / tokens, parameters, allow_unused=True)
        assign(policy, [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)])
        return full_tensors(policy)


@pytest.fixture(scope="module")
def plain(weights: Path) -> dict[str, Tensor]:
    (both,) = run(1, plain_gradients, weights, BALANCED)
    for one in ({"moe_aux_loss_coef": 0.0}, {"moe_z_loss_coef": 0.0}):
        (other,) = run(1, plain_gradients, weights, replace(BALANCED, **one))
        router = next(name for name in both if "router" in name)
        change = float((both[router] - other[router]).abs().max() / both[router].abs().max())
        assert change > 0.1, f"without {one} it would be nearly the same"
    return both


@pytest.mark.parametrize("layout", ["alone", *LAYOUTS])
def test_router_losses_are_means_over_all_tokens(layout: str, weights: Path, plain: dict[str, Tensor]) -> None:
    ranks, parallel = LAYOUTS.get(layout, (1, ParallelConfig()))
    found = run(ranks, gradients_of_updates, weights, parallel)[0]
    assert found.keys() == VARIANTS.keys()
    for variant, gradients in found.items():
        assert gradients.keys() == plain.keys()
        for name, expected in plain.items():
            tolerance = 1e-5 * float(expected.abs().max()) + 1e-9
            torch.testing.assert_close(
                gradients[name], expected, rtol=0, atol=tolerance, msg=lambda m, v=variant, n=name: f"{v}: {n}: {m}"
            )


# --- Initial weights, responses and checkpoints ---


def random_weights(parallel: ParallelConfig) -> dict[str, Tensor]:
    config = run_config(parallel, model=MODEL)
    with distributed(config):
        return full_tensors(Policy(config, VOCAB))


@pytest.mark.parametrize("layout", ["ep2", "tp2-ep2-sp"])
def test_random_weights_do_not_depend_on_the_layout(layout: str) -> None:
    (expected,) = run(1, random_weights, ParallelConfig())
    found = run(*LAYOUTS[layout][:1], random_weights, LAYOUTS[layout][1])[0]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    experts = next(tensor for name, tensor in expected.items() if "experts" in name).flatten(0, -3)
    assert len(experts) >= MODEL.num_experts
    assert len({float(expert.sum()) for expert in experts}) == len(experts)


@pytest.mark.parametrize("layout", ["ep2", "dp2-ep2", "cp2-ep2", "pp2-ep2", "tp2-ep2-sp"])
def test_responses_are_the_same_at(layout: str, weights: Path) -> None:
    calls = [(ROLLOUT, make_prompts(), 1, 0.0, 1), (replace(ROLLOUT, batch_size=5), make_prompts(), 4, 1.2, 1)]
    (alone,) = run(1, partial(generate, model=MODEL), weights, ParallelConfig(), calls)
    ranks, parallel = LAYOUTS[layout]
    for found in run(ranks, partial(generate, model=MODEL), weights, parallel, calls):
        for ours, expected in zip(found, alone, strict=True):
            assert tokens_of(ours) == tokens_of(expected)
            assert logprobs_of(ours) == pytest.approx(logprobs_of(expected), abs=1e-5)


def go_on(weights: Path, root: Path, parallel: ParallelConfig, save: bool) -> list[dict[str, float]]:
    """Run two updates and save, or load that checkpoint; then run three updates."""
    config = replace(learning_config(parallel), model=MODEL)
    with open_policy(config, weights / "reference") as policy:
        policy.keep_reference()
        if save:
            learn(policy, range(2))
            checkpoint.save(root, 7, policy, {})
        else:
            checkpoint.load(root / "step_000007", policy)
        return learn(policy, range(2, 5))


@pytest.fixture(scope="module")
def saved(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    root = tmp_path_factory.mktemp("saved")
    return root, run(2, go_on, weights, root, LAYOUTS["ep2"][1], True)[0]


@pytest.mark.parametrize("layout", ["alone", "ep2", "cp2-ep2", "tp2-ep2-sp"])
def test_a_checkpoint_of_spread_experts_is_read_at(
    layout: str, weights: Path, saved: tuple[Path, list[dict[str, float]]]
) -> None:
    root, expected = saved
    ranks, parallel = LAYOUTS.get(layout, (1, ParallelConfig()))
    for history in run(ranks, go_on, weights, root, parallel, False):
        for update, saved_update in zip(history, expected, strict=True):
            assert update == (saved_update if layout == "ep2" else pytest.approx(saved_update, rel=1e-5, abs=1e-6))
