"""Objectives by import path: the same numbers as the built-in ones, and a one-line error for each mistake."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aspo.errors import UserError
from megatron_aspo.loss import PolicyLossConfig, fused_linear_policy_loss, policy_loss
from megatron_aspo.loss.objectives import ObjectiveError, check_objective, find_objective

MODULE = """
from dataclasses import replace
import torch
from megatron_aspo.loss import Objective, TokenInputs, TokenTerms
from megatron_aspo.loss.objectives import aspo, gspo, response_mean_is

def same_as_aspo(x, config):
    return aspo(x, config)

def half(x, config):
    return TokenTerms.from_weight(x, torch.full_like(x.ratio, 0.5))

def log_weight(x, config):
    return TokenTerms.from_weight(x, torch.where(x.ratio > 2, x.ratio.log() / 0, x.ratio))

same_as_gspo = Objective(lambda x, config: gspo(x, config), response_ratio="geometric")
same_as_response_mean_is = Objective(
    lambda x, config: response_mean_is(x, config), response_ratio="arithmetic", dual_clip=None
)

def inverse_probability(x, config):
    return TokenTerms.from_weight(x, -1 / torch.expm1(x.logprobs))  # finite for every probability below 1

self_normalised = Objective(
    lambda x, config: TokenTerms.from_weight(x, x.ratio / x.sequence_ratio), response_ratio="arithmetic"
)

def cap(x, config):
    return TokenTerms.from_weight(x, torch.full_like(x.ratio, 0.0 if config.dual_clip is None else config.dual_clip))

capped_at_5 = Objective(cap, dual_clip=5.0)
fails_as_record = Objective(lambda x: None)

def one_argument(x):
    return None

def no_terms(x, config):
    return x.ratio

def mean(x, config):
    terms = TokenTerms.from_weight(x, x.ratio)
    return terms if x.ratio.numel() == 21 else replace(terms, value=x.ratio.mean())

def whole_numbers(x, config):
    return TokenTerms.from_weight(x, torch.ones_like(x.ratio, dtype=torch.long))

def no_tensor(x, config):
    return replace(TokenTerms.from_weight(x, x.ratio), weight=1.0)

def fails(x, config):
    return x.ratios

def fails_later(x, config):
    return TokenTerms.from_weight(x, x.ratio if x.ratio.numel() == 21 else x.ratio[:1].expand(2, 2)[:, :0] @ x.ratio)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A fresh module `mine` for each test."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine", None)


def inputs(tokens: int = 30) -> dict[str, Any]:
    torch.manual_seed(0)
    logprobs, old = -torch.rand(2, tokens) * 3, -torch.rand(2, tokens) * 3
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": old,
        "advantages": torch.randn(2, tokens),
        "loss_mask": torch.rand(2, tokens) < 0.8,
    }


def fused(objective: str) -> list[torch.Tensor]:
    """Loss and gradients of the fused head, in chunks of 5."""
    batch = inputs(8)
    torch.manual_seed(1)
    hidden, weight = torch.randn(2, 8, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    rest: dict[str, Any] = {name: batch[name] for name in ("old_logprobs", "advantages", "loss_mask")}
    rest |= {"targets": torch.randint(11, (2, 8)), "chunk_size": 5, "config": PolicyLossConfig(objective=objective)}
    out = fused_linear_policy_loss(hidden, weight, **rest)
    return [out.loss_sum, *torch.autograd.grad(out.loss_sum, (hidden, weight))]


@pytest.mark.parametrize("name", ["aspo", "gspo", "response_mean_is"])
def test_one_that_is_built_in_equals_it(name: str) -> None:
    """A copy of a built-in objective gives the same result, with ratios of whole responses too."""
    found = []
    for objective in (name, f"mine:same_as_{name}"):
        batch = inputs()
        out = policy_loss(config=PolicyLossConfig(objective=objective), **batch)
        (grad,) = torch.autograd.grad(out.loss_sum, batch["logprobs"])
        metrics = torch.stack([number for pair in out.metrics.values() for number in pair])
        found.append([out.loss_sum, grad, metrics, *fused(objective)])
        assert out.metrics["clip_fraction_pos"][0] > 0
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("objective", "dual_clip", "expected"),
    [
        ("aspo", "default", 3.0),
        ("grpo", "default", None),
        ("response_mean_is", "default", None),
        ("grpo", 3.0, 3.0),
        ("aspo", None, None),
        ("mine:cap", "default", 3.0),  # as in ASPO
        ("mine:capped_at_5", "default", 5.0),
        ("mine:capped_at_5", 2.0, 2.0),
        ("mine:capped_at_5", None, None),
    ],
)
def test_the_default_dual_clip_is_the_objectives(objective: str, dual_clip: Any, expected: float | None) -> None:
    config = PolicyLossConfig(objective=objective, dual_clip=dual_clip)
    assert find_objective(config)[1].dual_clip == expected
    if objective.startswith("mine"):
        batch = inputs()
        (grad,) = torch.autograd.grad(policy_loss(config=config, **batch).loss_sum, batch["logprobs"])
        assert torch.equal(grad, torch.where(batch["loss_mask"], -(expected or 0.0) * batch["advantages"], 0.0))


def test_the_gradient_is_the_weight_times_the_advantage() -> None:
    batch = inputs()
    out = policy_loss(config=PolicyLossConfig(objective="mine:half"), **batch)
    (grad,) = torch.autograd.grad(out.loss_sum, batch["logprobs"])
    expected = torch.where(batch["loss_mask"], -0.5 * batch["advantages"], 0.0)
    assert torch.equal(grad, expected)
    assert out.loss_sum.item() == pytest.approx((expected * batch["logprobs"]).sum().item(), rel=1e-6)


@pytest.mark.parametrize("objective", ["mine:inverse_probability", "mine:self_normalised"])
def test_weights_need_no_value_at_masked_slots(objective: str) -> None:
    """A second response without a trained token, as padding makes it, changes no gradient."""
    batch, config = inputs(), PolicyLossConfig(objective=objective)
    check_objective(config)
    batch["loss_mask"][1] = False
    out = policy_loss(config=config, **batch)
    (grad,) = torch.autograd.grad(out.loss_sum, batch["logprobs"])
    alone = {name: value[:1].detach() for name, value in batch.items()}
    alone["logprobs"].requires_grad_()
    first = policy_loss(config=config, **alone)
    (expected,) = torch.autograd.grad(first.loss_sum, alone["logprobs"])
    torch.testing.assert_close(grad, torch.cat([expected, torch.zeros_like(expected)]), rtol=1e-6, atol=0)
    assert out.loss_sum.item() == pytest.approx(first.loss_sum.item(), rel=1e-5)
    assert first.loss_sum.item() != 0
    assert all(number.isfinite().all() for number in fused(objective))


WRONG = {
    "no_such:f": "cannot import no_such:f: ",
    "mine:no_such": "cannot import mine:no_such: ",
    "broken:f": "cannot import broken:f: its module fails with ZeroDivisionError: division by zero",
    "mine:torch": "mine:torch is not a function or class",
    "mine:one_argument": r"mine:one_argument\(x\) must take \(inputs, config\)",
    "mine:fails_as_record": "failed: TypeError: ",
    "mine:no_terms": "returned Tensor; return TokenTerms",
    "mine:no_tensor": "returned a weight that is no tensor",
    "mine:whole_numbers": "returned a weight of torch.int64; it must be floating point",
    "mine:fails": "failed: AttributeError: ",
    "mine:log_weight": r"returned the weight inf for ratio .* and advantage -?\d.*; weights must be finite",
}


@pytest.mark.parametrize("objective", WRONG)
def test_a_wrong_one_is_refused_before_training_and_by_the_library(objective: str) -> None:
    with pytest.raises(UserError, match=f"^loss.objective={objective}.*{WRONG[objective]}"):
        check_objective(PolicyLossConfig(objective=objective))
    with pytest.raises(ValueError, match=f"^objective={objective}.*{WRONG[objective]}"):
        policy_loss(config=PolicyLossConfig(objective=objective), **inputs())


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("mine:mean", r"returned a value that is no tensor of shape \[60\]"),
        ("mine:fails_later", "failed: RuntimeError"),
    ],
)
def test_one_that_goes_wrong_later_names_itself(objective: str, message: str) -> None:
    check_objective(PolicyLossConfig(objective=objective))
    with pytest.raises(ObjectiveError, match=f"^objective={objective} {message}"):
        policy_loss(config=PolicyLossConfig(objective=objective), **inputs())
