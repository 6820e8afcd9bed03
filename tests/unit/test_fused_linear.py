"""The fused head against the path through logits, in one process."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_aspo.config.loss import Aggregation, ObjectiveName, PolicyLossConfig
from megatron_aspo.loss import (
    LossOutput,
    fused_linear_logprobs,
    fused_linear_policy_loss,
    policy_loss,
    vocab_parallel_logprobs,
)

OBJECTIVES = get_args(ObjectiveName)
PER_TOKEN = ("old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs")
EVERYTHING: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.02, "aggregation": "seq-mean-token-mean"}


def make_batch(
    shape: tuple[int, ...],
    hidden_size: int = 5,
    vocabulary: int = 11,
    padding: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Every input but the configuration: ratios on both sides of all clips, about a fifth of the tokens masked."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    hidden = normal(*shape, hidden_size).to(dtype)
    weight = (2 * normal(vocabulary + padding, hidden_size) / math.sqrt(hidden_size)).to(dtype)
    targets = torch.randint(vocabulary, shape, generator=generator)
    log_p = torch.log_softmax(hidden.double() @ weight.double().T[:, :vocabulary], -1)
    now = log_p.gather(-1, targets[..., None])[..., 0]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "old_logprobs": (now - normal(*shape) ** 3 / 2).to(kind),
        "advantages": (normal(*shape) * (torch.rand(shape, generator=generator) > 0.2)).to(kind),
        "loss_mask": torch.rand(shape, generator=generator) < 0.8,
        "ref_logprobs": (now + normal(*shape) / 3).to(kind),
        "rollout_logprobs": (now + normal(*shape) / 3).to(kind),
        "sequence_ids": torch.randint(3, shape, generator=generator) * 7,
    } | ({"vocab_size": vocabulary} if padding else {})


def leaves_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: batch[name].detach().clone().requires_grad_() for name in ("hidden", "weight")}


def fused(batch: dict[str, Any], config: PolicyLossConfig, **options: Any) -> tuple[LossOutput, dict[str, Tensor]]:
    """The loss, and the gradients of 3 times its sum with respect to hidden and weight."""
    leaves = leaves_of(batch)
    out = fused_linear_policy_loss(**batch | leaves, config=config, **options)
    (3 * out.loss_sum).backward()
    return out, gradients_of(leaves)


def through_logits(
    batch: dict[str, Any], config: PolicyLossConfig, temperature: float = 1.0
) -> tuple[LossOutput, dict[str, Tensor]]:
    """The same results by matrix product, log-probs, loss, and torch's differentiation of the product."""
    leaves = leaves_of(batch)
    rest = {name: value for name, value in batch.items() if name not in ("hidden", "weight", "targets", "vocab_size")}
    logprobs, entropy = vocab_parallel_logprobs(
        leaves["hidden"] @ leaves["weight"].T,
        batch["targets"],
        None,
        temperature=temperature,
        vocab_size=batch.get("vocab_size"),
        loss_mask=batch["loss_mask"],
    )
    out = policy_loss(logprobs, entropy=entropy, config=config, **rest)
    (3 * out.loss_sum).backward()
    return out, gradients_of(leaves)


def gradients_of(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    grads: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        grads[name] = leaf.grad
    return grads


def assert_same(
    found: tuple[LossOutput, dict[str, Tensor]], right: tuple[LossOutput, dict[str, Tensor]], tolerance: float
) -> None:
    def tensors(out: LossOutput, grads: dict[str, Tensor]) -> dict[str, Any]:
        named = {"loss_sum": out.loss_sum.detach(), "denominator": out.denominator, "entropy": out.entropy}
        named |= {"logprobs": out.logprobs, **out.maxima}
        named |= {f"{name}, sum": total for name, (total, _) in out.metrics.items()}
        named |= {f"{name}, count": count for name, (_, count) in out.metrics.items()}
        return named | {f"gradient of {name}": grad for name, grad in grads.items()}

    torch.testing.assert_close(tensors(*found), tensors(*right), rtol=tolerance, atol=tolerance)


# --- Equal to the path through logits ---


@st.composite
def configs(draw: Any) -> PolicyLossConfig:
    return PolicyLossConfig(
        objective=draw(st.sampled_from(OBJECTIVES)),
        aggregation=draw(st.sampled_from(get_args(Aggregation))),
        norm_length=7,
        dual_clip=draw(st.sampled_from([3.0, None])),
        kl_coef=draw(st.sampled_from([0.0, 0.1])),
        kl_estimator=draw(st.sampled_from(["k1", "k2", "k3"])),
        entropy_coef=draw(st.sampled_from([0.0, 0.05, -0.05])),
        entropy_quantile=draw(st.sampled_from([None, 0.5])),
        rollout_correction=draw(st.sampled_from(["none", "truncate", "mask"])),
        rollout_ratio_low=0.8,
        rollout_ratio_high=1.3,
        rollout_sequence_high=draw(st.sampled_from([None, 1.05])),
        rollout_veto=draw(st.sampled_from([None, 0.6])),
    )


@st.composite
def batches(draw: Any, config: PolicyLossConfig, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Any shape and any mask; masked slots hold garbage."""
    count = st.sampled_from([0, 1, 2, 3, 5, 8, 13])
    shape = draw(st.tuples(count) | st.tuples(st.integers(0, 3), count), "shape")
    sizes = (draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 7, 16])), draw(st.sampled_from([0, 0, 1, 5])))
    batch = make_batch(shape, *sizes, draw(st.integers(0, 999)), dtype)
    mask = batch["loss_mask"]
    match draw(st.sampled_from(["random", "full", "empty", "a response without tokens"])):
        case "full":
            mask = torch.ones_like(mask)
        case "empty":
            mask = torch.zeros_like(mask)
        case "a response without tokens":
            mask = mask & (batch["sequence_ids"] != 7)
    garbage = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
    batch |= {name: batch[name].masked_fill(~mask, garbage) for name in PER_TOKEN}
    batch["targets"] = batch["targets"].masked_fill(~mask, draw(st.sampled_from([-100, 1 << 40])))
    batch["sequence_ids"] = batch["sequence_ids"].masked_fill(~mask, draw(st.sampled_from([-1, 7, 1 << 40])))
    batch["loss_mask"] = mask
    optional = ["sequence_ids"]
    if not config.kl_coef:
        optional.append("ref_logprobs")
    if not config.corrects_rollout:
        optional += ["rollout_logprobs", "old_logprobs"]
    for name in optional:
        if draw(st.booleans()):
            batch[name] = None
    return batch


@given(st.data(), configs(), st.sampled_from([1.0, 0.6, 1.7]))
@settings(max_examples=250)
def test_every_number_is_that_of_the_path_through_logits(
    data: st.DataObject, config: PolicyLossConfig, temperature: float
) -> None:
    batch = data.draw(batches(config))
    chunk_size = data.draw(st.integers(1, batch["targets"].numel() + 1), "chunk_size")
    right = through_logits(batch, config, temperature)
    found = fused(batch, config, chunk_size=chunk_size, temperature=temperature)
    assert_same(found, right, 1e-10)
    assert all(torch.isfinite(grad).all() for grad in found[1].values())
    assert found[0].logprobs.shape == batch["targets"].shape


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("objective", ["sapo", "aspo", "gspo"])
def test_lower_precision_is_near_float64(objective: str, dtype: torch.dtype, tolerance: float) -> None:
    """All ratios stay away from the clips, where rounding would cause a jump."""
    config = PolicyLossConfig(
        objective=objective,
        clip_low=0.99,
        clip_high=1e6,
        dual_clip=None,
        kl_coef=0.1,
        entropy_coef=0.05,
    )
    batch = make_batch((40,), 16, 50, padding=6, dtype=dtype)
    batch["old_logprobs"] = batch["old_logprobs"].clamp(min=-4)
    out, grads = fused(batch, config, chunk_size=16, temperature=0.8)
    assert out.logprobs.dtype == out.loss_sum.dtype == torch.float32
    assert {name: grad.dtype for name, grad in grads.items()} == {"hidden": dtype, "weight": dtype}

    exact = {name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in batch.items()}
    right, right_grads = through_logits(exact, config, 0.8)
    scale = {"loss_sum": float(right.denominator + right.loss_sum.detach().abs())} | {
        n: float(g.abs().max()) for n, g in right_grads.items()
    }
    pairs = {"loss_sum": (out.loss_sum.detach(), right.loss_sum.detach())}
    pairs |= {name: (grads[name], right_grads[name]) for name in grads}
    for name, (one, other) in pairs.items():
        assert float((one.double() - other).abs().max()) < tolerance * scale[name], name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_extreme_logits_give_finite_numbers(dtype: torch.dtype) -> None:
    """Logits of ±1e4: certain and impossible tokens, both as targets and as others."""
    config = PolicyLossConfig(kl_coef=0.1, kl_estimator="k1", entropy_coef=0.1)  # k3 would be exp(20)
    batch = make_batch((8,), 4, 9, dtype=dtype) | {"loss_mask": torch.ones(8)}
    batch["hidden"] = torch.sign(batch["hidden"]) * torch.tensor([1e4, 1e4, 3e3, 1.0], dtype=dtype)
    batch["weight"] = torch.sign(batch["weight"])
    found, right = fused(batch, config), through_logits(batch, config)
    assert float(right[0].logprobs.min()) < -1e4
    assert float(right[0].logprobs.max()) > -1e-3
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for name, grad in found[1].items():
        assert torch.isfinite(grad).all(), name
        torch.testing.assert_close(grad, right[1][name], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[0].loss_sum, right[0].loss_sum, rtol=tolerance, atol=tolerance)
    assert torch.isfinite(found[0].loss_sum)


def test_strides_do_not_matter() -> None:
    """Hidden states as a transposed or strided view, and a weight that is a slice of a larger one."""
    batch, config = make_batch((4, 6)), PolicyLossConfig(objective="gspo")
    right = fused(batch, config, chunk_size=5)
    hidden = batch["hidden"].transpose(0, 1).contiguous().requires_grad_()
    weight = torch.stack([batch["weight"], batch["weight"]], -1).requires_grad_()
    views = {"hidden": hidden.transpose(0, 1), "weight": weight[..., 0]}
    assert not views["hidden"].is_contiguous()
    assert not views["weight"].is_contiguous()
    out = fused_linear_policy_loss(**batch | views, config=config, chunk_size=5)
    (3 * out.loss_sum).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(hidden.grad.transpose(0, 1), right[1]["hidden"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weight.grad[..., 0], right[1]["weight"], rtol=1e-12, atol=1e-14)
    assert weight.grad[..., 1].eq(0).all()


def test_the_inputs_are_left_alone() -> None:
    batch = make_batch((3, 5), padding=2)
    before = {name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)}
    fused(batch, PolicyLossConfig(objective="gspo", **EVERYTHING), loss_scale=2.0)
    assert all(torch.equal(batch[name], value) for name, value in before.items())


# --- Log-probs alone ---


@given(st.data(), st.sampled_from([1.0, 0.6, 1.7]))
@settings(max_examples=60)
def test_logprobs_alone_are_those_of_the_path_through_logits(data: st.DataObject, temperature: float) -> None:
    batch = data.draw(batches(PolicyLossConfig()))
    mask = batch["loss_mask"] if data.draw(st.booleans()) else None
    if mask is None:
        batch["targets"] = batch["targets"].clamp(0, batch.get("vocab_size", len(batch["weight"])) - 1)
    options = {"temperature": temperature, "vocab_size": batch.get("vocab_size"), "loss_mask": mask}
    right = vocab_parallel_logprobs(batch["hidden"] @ batch["weight"].T, batch["targets"], None, **options)
    hidden = batch["hidden"].requires_grad_()
    chunk_size = data.draw(st.integers(1, batch["targets"].numel() + 1))
    found = fused_linear_logprobs(hidden, batch["weight"], batch["targets"], chunk_size=chunk_size, **options)
    assert [values.requires_grad for values in found] == [False, False]
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other if mask is None else other * (mask != 0), rtol=1e-11, atol=1e-11)


# --- Requested gradients, and their destination ---


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket._qualified_op_name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("hidden", "weight", "per_chunk"), [(True, True, 3), (False, True, 2), (True, False, 2), (False, False, 1)]
)
@pytest.mark.parametrize("objective", ["aspo", "gspo"])
def test_only_wanted_gradients_are_made(objective: str, hidden: bool, weight: bool, per_chunk: int) -> None:
    """Counts matrix products of three chunks. For a gradient, a per-response objective computes the logits twice."""
    batch, config = make_batch((14,)), PolicyLossConfig(objective=objective)
    assert 9 <= batch["loss_mask"].count_nonzero() <= 12  # masked tokens are skipped
    right, right_grads = fused(batch, config, chunk_size=4)
    leaves = leaves_of(batch)
    leaves["hidden"].requires_grad_(hidden)
    leaves["weight"].requires_grad_(weight)
    with Products() as products:
        out = fused_linear_policy_loss(**batch | leaves, config=config, chunk_size=4)
    assert products.count == 3 * (per_chunk + (objective == "gspo" and (hidden or weight)))
    assert torch.equal(out.loss_sum, right.loss_sum)
    assert out.loss_sum.requires_grad == (hidden or weight)
    if hidden or weight:
        with Products() as products:
            (3 * out.loss_sum).backward()
        assert products.count == 0
    for name, wanted in (("hidden", hidden), ("weight", weight)):
        grad = leaves[name].grad
        assert (grad is not None) == wanted
        assert grad is None or torch.equal(grad, right_grads[name])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_gradients_the_value_is_the_same_and_nothing_is_written(objective: str) -> None:
    batch, config = make_batch((14,)), PolicyLossConfig(objective=objective)
    right, _ = fused(batch, config, chunk_size=4)
    leaves = leaves_of(batch)
    main_grad = torch.full_like(batch["weight"], 5.0)
    leaves["weight"].main_grad = main_grad
    with torch.no_grad(), Products() as products:
        out = fused_linear_policy_loss(**batch | leaves, config=config, chunk_size=4)
    assert products.count == 3
    assert not out.loss_sum.requires_grad
    assert torch.equal(out.loss_sum, right.loss_sum)
    assert {n: [float(x) for x in pair] for n, pair in out.metrics.items()} == {
        n: [float(x) for x in pair] for n, pair in right.metrics.items()
    }
    assert main_grad.eq(5).all()
    assert [leaf.grad for leaf in leaves.values()] == [None, None]


@pytest.mark.parametrize("objective", ["aspo", "gspo"])
def test_masked_tokens_cost_nothing_and_their_states_may_be_anything(objective: str) -> None:
    config = PolicyLossConfig(objective=objective, **EVERYTHING)
    batch = make_batch((3, 20)) | {"loss_mask": torch.arange(20).expand(3, 20) % 5 == 0}
    right = through_logits(batch, config)
    batch["hidden"] = batch["hidden"].masked_fill(~batch["loss_mask"][..., None], torch.nan)
    with Products() as products:
        found = fused(batch, config, chunk_size=6)
    assert products.count == 2 * (4 if objective == "gspo" else 3)
    assert_same(found, right, 1e-10)


def test_a_second_backward_is_refused() -> None:
    leaves = leaves_of(batch := make_batch((4,)))
    out = fused_linear_policy_loss(**batch | leaves, config=PolicyLossConfig())
    out.loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="fused_linear_policy_loss a second time"):
        out.loss_sum.backward()


@pytest.mark.parametrize(
    ("dtype", "main_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2]
)
@pytest.mark.parametrize("loss_scale", [1.0, 8.0, torch.tensor(8.0)], ids=str)
def test_main_grad_is_added_to(loss_scale: float | Tensor, dtype: torch.dtype, main_dtype: torch.dtype) -> None:
    """Two micro-batches accumulate onto the existing values; autograd's own gradient is None."""
    config = PolicyLossConfig()
    batch = make_batch((10,), padding=3, dtype=dtype)
    leaves, plain = leaves_of(batch), leaves_of(batch)
    main_grad = torch.full_like(batch["weight"], 5.0, dtype=main_dtype)
    leaves["weight"].main_grad = main_grad
    for _ in range(2):
        out = fused_linear_policy_loss(**batch | leaves, config=config, chunk_size=4, loss_scale=loss_scale)
        assert not main_grad.eq(5).all()  # filled by the forward pass
        (out.loss_sum * loss_scale).backward()
        (fused_linear_policy_loss(**batch | plain, config=config, chunk_size=4).loss_sum * loss_scale).backward()
    assert leaves["weight"].grad is None
    found, right = gradients_of({"hidden": leaves["hidden"]}), gradients_of(plain)
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(main_grad - 5, right["weight"].to(main_dtype), rtol=close, atol=close)
    torch.testing.assert_close(found["hidden"], right["hidden"], rtol=close, atol=close)


@pytest.mark.parametrize(
    ("dtype", "main_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float64, torch.float32)],
)
def test_a_main_grad_that_would_round_is_left_alone(dtype: torch.dtype, main_dtype: torch.dtype) -> None:
    batch, config = make_batch((10,), dtype=dtype), PolicyLossConfig()
    leaves = leaves_of(batch)
    main_grad = torch.full_like(batch["weight"], 5.0, dtype=main_dtype)
    leaves["weight"].main_grad = main_grad
    leaves["weight"].grad_added_to_main_grad = False
    (3 * fused_linear_policy_loss(**batch | leaves, config=config).loss_sum).backward()
    assert main_grad.eq(5).all()
    assert leaves["weight"].grad_added_to_main_grad is False
    right = fused(batch, config)[1]
    assert torch.equal(gradients_of(leaves)["weight"], right["weight"])


def test_megatron_is_told_that_the_gradient_is_in_main_grad() -> None:
    """Megatron's hooks require a placeholder gradient of the weight's shape, or None if the embedding shares the
    weight. The placeholder must be freed after the backward pass, because writing to it would change the weight."""
    batch = make_batch((10,))
    for shared in (False, True):
        leaves = leaves_of(batch)
        weight: Any = leaves["weight"]
        weight.main_grad = torch.zeros_like(batch["weight"])
        weight.grad_added_to_main_grad = False
        if shared:
            weight.zero_out_wgrad = True
        seen: list[Any] = []
        weight.register_post_accumulate_grad_hook(lambda leaf, seen=seen: seen.append(leaf.grad))
        for _ in range(2):
            fused_linear_policy_loss(**batch | leaves, config=PolicyLossConfig()).loss_sum.backward()
            assert weight.grad is None
        assert weight.grad_added_to_main_grad is True
        assert [None if grad is None else grad.shape for grad in seen] == [None if shared else weight.shape] * 2
        assert torch.equal(weight, batch["weight"])
        torch.testing.assert_close(3 * weight.main_grad, 2 * fused(batch, PolicyLossConfig())[1]["weight"])


def test_a_frozen_weight_keeps_its_main_grad() -> None:
    leaves = leaves_of(batch := make_batch((10,)))
    weight: Any = leaves["weight"].requires_grad_(False)
    weight.main_grad = torch.zeros_like(batch["weight"])
    (7 * fused_linear_policy_loss(**batch | leaves, config=PolicyLossConfig()).loss_sum).backward()
    assert weight.main_grad.eq(0).all()
    assert weight.grad is None
    assert leaves["hidden"].grad is not None


@pytest.mark.parametrize(("loss_scale", "factor"), [(1.0, 2.0), (8.0, 1.0), (8.0, 4.0)])
def test_a_factor_that_main_grad_did_not_get_is_refused(loss_scale: float, factor: float) -> None:
    leaves = leaves_of(batch := make_batch((10,)))
    leaves["weight"].main_grad = torch.zeros_like(batch["weight"])
    out = fused_linear_policy_loss(**batch | leaves, config=PolicyLossConfig(), loss_scale=loss_scale)
    with pytest.raises(ValueError, match=f"pass that factor as loss_scale.*is {loss_scale:g}, the factor {factor:g}"):
        (factor * out.loss_sum).backward()
