"""Responses that lie across micro-batches."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megatron_aspo.config import Aggregation, Objective, PolicyLossConfig
from megatron_aspo.loss import fused_linear_policy_loss, policy_loss, response_terms_of, vocab_parallel_logprobs

T, H, V = 60, 6, 19
PARTS = [(0, 17), (17, 18), (18, 18), (18, 60)]


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(T, H), normal(V, H)
    targets = torch.randint(0, V, (T,), generator=generator)
    logprobs, entropy = vocab_parallel_logprobs(hidden @ weight.t(), targets, None)
    old = logprobs + normal(T)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "logprobs": logprobs,
        "entropy": entropy,
        "old_logprobs": old,
        "rollout_logprobs": old + 0.5 * normal(T),
        "ref_logprobs": logprobs + normal(T),
        "advantages": normal(T),
        "loss_mask": torch.rand(T, generator=generator) < 0.7,
        "sequence_ids": torch.arange(T) // 13 * 5,  # neither dense nor in step with the micro-batches
    }


def part(inputs: dict[str, Any], names: str, start: int, end: int) -> dict[str, Any]:
    return {name: inputs[name][start:end] for name in names.split()}


TENSORS = "old_logprobs rollout_logprobs ref_logprobs advantages loss_mask sequence_ids"


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
@pytest.mark.parametrize("objective", get_args(Objective))
def test_the_sum_over_micro_batches_is_the_whole(objective: str, aggregation: str) -> None:
    inputs = batch()
    config = PolicyLossConfig(
        objective=objective,  # type: ignore[arg-type]
        aggregation=aggregation,  # type: ignore[arg-type]
        norm_length=9,
        entropy_quantile=0.8,
        kl_coef=0.1,
        entropy_coef=0.05,
        rollout_correction="truncate",
        rollout_sequence_high=1.3,
    )
    hidden, weight = inputs["hidden"].clone().requires_grad_(), inputs["weight"].clone().requires_grad_()
    whole = fused_linear_policy_loss(hidden, weight, inputs["targets"], config=config, **part(inputs, TENSORS, 0, T))
    whole.loss_sum.backward()
    assert 0 < whole.metrics["rollout_dropped"][0] < whole.metrics["rollout_dropped"][1]

    terms = response_terms_of([part(inputs, f"logprobs entropy {TENSORS}", *p) for p in PARTS], config)
    hidden_in_parts, weight_in_parts = hidden.detach().requires_grad_(), weight.detach().clone().requires_grad_()
    total = {"fused": torch.zeros(2, dtype=torch.float64), "two steps": torch.zeros(2, dtype=torch.float64)}
    for (start, end), own in zip(PARTS, terms, strict=True):
        options: dict[str, Any] = {
            "config": config,
            "response_terms": own,
            "allow_empty": True,
            **part(inputs, TENSORS, start, end),
        }
        out = fused_linear_policy_loss(
            hidden_in_parts[start:end], weight_in_parts, inputs["targets"][start:end], **options, chunk_size=7
        )
        out.loss_sum.backward()
        total["fused"] += torch.stack([out.loss_sum.detach(), out.denominator.double()])
        logprobs, entropy = inputs["logprobs"][start:end], inputs["entropy"][start:end]
        out = policy_loss(logprobs, entropy=entropy, **options)
        total["two steps"] += torch.stack([out.loss_sum, out.denominator.double()])
    for sums in total.values():
        assert sums.tolist() == pytest.approx([whole.loss_sum.item(), whole.denominator.item()], rel=1e-12)
    torch.testing.assert_close(hidden_in_parts.grad, hidden.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weight_in_parts.grad, weight.grad, rtol=1e-10, atol=1e-12)


def test_ids_are_needed() -> None:
    inputs = batch()
    with pytest.raises(ValueError, match="sequence_ids is missing in a micro-batch"):
        response_terms_of([part(inputs, "logprobs advantages loss_mask", 0, 9)], PolicyLossConfig())
    with pytest.raises(ValueError, match="logprobs is missing in a micro-batch"):
        response_terms_of([part(inputs, "advantages loss_mask sequence_ids", 0, 9)], PolicyLossConfig())
    assert response_terms_of([], PolicyLossConfig()) == []
