"""Behind a pipeline, the gradients of an update's loss are those of a float64 oracle apart from the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import surrogate_of
from ranks import full_tensors, gradients_of_steps, make_samples, open_policy, run, run_config
from test_layouts import LOSSES
from torch import Tensor

from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.policy import checkpoint, trainer
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.train import set_logprobs, set_ref_logprobs

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "pp2": ParallelConfig(pipeline=2),
    "tp2-pp2": ParallelConfig(tensor=2, pipeline=2),
}
OUTPUT = "output_layer.weight"


def gradients_at_the_head(folder: Path, parallel: ParallelConfig) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """On a last stage: by loss, pairs of a gradient and the oracle's, of each stream's hidden states [T, H], then of
    the whole output weight. Streams hold several samples each."""
    config = replace(run_config(parallel), train=TrainConfig(max_tokens_per_micro_batch=100))
    seen: list[tuple[Tensor, dict[str, Any]]] = []
    head = trainer.megatron_loss_head

    def recording(*, hidden_states: Tensor, context: Any, **given: Any) -> Any:
        hidden_states.retain_grad()
        seen.append((hidden_states, context))
        return head(hidden_states=hidden_states, context=context, **given)

    trainer.megatron_loss_head = recording
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with open_policy(config, folder / "reference") as policy:
        policy.keep_reference()
        gradients = gradients_of_steps(policy)
        batches = policy.pack(make_samples())
        checkpoint.load_weights(folder / "old", policy)
        set_logprobs(policy, [batches])
        set_ref_logprobs(policy, [batches])
        for name in ("aspo", "aspo, anchored", "gspo, anchored"):
            checkpoint.load_weights(folder / "current", policy)
            whole = full_tensors(policy)[OUTPUT].double()
            policy.train_step(batches, LOSSES[name], UpdateMetrics())
            of_weight, streams = gradients.pop()[OUTPUT].double(), [*seen]
            seen.clear()
            if not policy.is_last_stage:
                continue
            total, denominators = torch.zeros_like(whole), 0.0
            for hidden, context in streams:
                leaves = [x.detach().double().requires_grad_() for x in (hidden[:, 0], whole[: policy.vocab_size])]
                data = {key: value for key, value in context.items() if isinstance(value, Tensor) and value.ndim == 2}
                logits = leaves[0] @ leaves[1].t() / config.rollout.temperature
                surrogate, _, denominator, _, _ = surrogate_of(logits, data, LOSSES[name])
                expected = torch.autograd.grad(surrogate, leaves)
                assert hidden.grad is not None
                found.setdefault(name, []).append((hidden.grad[:, 0].double(), expected[0]))
                total[: policy.vocab_size] += expected[1]
                denominators += denominator
            found[name].append((of_weight, total / denominators))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_behind_a_pipeline_are_the_oracles(layout: str, weights: Path) -> None:
    parallel = LAYOUTS[layout]
    last = [found for found in run(parallel.model_parallel_size, gradients_at_the_head, weights, parallel) if found]
    assert len(last) == parallel.tensor
    for found in last:
        assert len(found) == 3
        for name, pairs in found.items():
            assert len(pairs) > 3
            for i, (gradient, expected) in enumerate(pairs):
                error = float((gradient - expected).norm() / expected.norm())
                assert error < 1e-5, f"{name}, {i} of {len(pairs) - 1} streams and the weight: {error:.1e}"
