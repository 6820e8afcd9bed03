"""Log-probs and entropy against float64 softmax, and the closure for Megatron-Core's schedules."""

import math
from typing import Any, get_args

import pytest
import torch
from scalar_losses import scalar_terms
from torch import Tensor

from benchmarks.counting import Count
from megatron_aspo.config import Objective, PolicyLossConfig
from megatron_aspo.loss import megatron_loss_func, softmax, vocab_parallel_logprobs

V = 23
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6}


def random_logits(*shape: int, scale: float = 4.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, V, generator=generator, dtype=torch.float64)).to(dtype)


def random_targets(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(7))


def reference(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """By the definition, in float64."""
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    entropy = -torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], entropy


def reference_gradient(
    logits: Tensor, targets: Tensor, temperature: float, grad_logprobs: Tensor, grad_entropy: Tensor
) -> Tensor:
    """By torch's own differentiation of the definition."""
    leaf = logits.detach().double().requires_grad_()
    log_p = torch.log_softmax(leaf / temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    logprobs = log_p.gather(-1, targets[..., None])[..., 0]
    ((grad_logprobs * logprobs).sum() + (grad_entropy * entropy).sum()).backward()
    assert leaf.grad is not None
    return leaf.grad


def whole(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    logprobs, entropy = vocab_parallel_logprobs(logits, targets, None, **options)
    assert entropy is not None
    return logprobs, entropy


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("tile", [1, 3, None])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_gradients(
    dtype: torch.dtype, tile: int | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile is not None:  # rows that are worked on at once
        monkeypatch.setattr(softmax, "_TILE_ELEMENTS", {"cpu": tile * V})
    logits, targets = random_logits(3, 5, dtype=dtype).requires_grad_(), random_targets(3, 5)
    logprobs, entropy = whole(logits, targets, temperature=temperature)
    assert logprobs.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference(logits.detach(), targets, temperature)
    tolerance = TOLERANCE[dtype]
    for found, right in zip((logprobs, entropy), expected, strict=True):
        torch.testing.assert_close(found.detach().double(), right, rtol=tolerance, atol=tolerance)

    upstream = random_logits(3, 5, dtype=logprobs.dtype)[..., :2].unbind(-1)
    torch.autograd.backward([logprobs, entropy], list(upstream))
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    right = reference_gradient(logits, targets, temperature, *upstream)
    tolerance = 8e-3 if dtype == torch.bfloat16 else 10 * tolerance  # stored in the logits' type
    torch.testing.assert_close(logits.grad.double(), right, rtol=tolerance, atol=1e-5 if tolerance > 1e-6 else 1e-12)


@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(which: tuple[bool, bool], temperature: float) -> None:
    targets = random_targets(2, 3)

    def chosen(logits: Tensor) -> tuple[Tensor, ...]:
        both = whole(logits, targets, temperature=temperature)
        return tuple(part for part, wanted in zip(both, which, strict=True) if wanted)

    assert torch.autograd.gradcheck(chosen, (random_logits(2, 3, scale=1.0, dtype=torch.float64).requires_grad_(),))


def test_without_entropy() -> None:
    logits, targets = random_logits(6).requires_grad_(), random_targets(6)
    logprobs, entropy = vocab_parallel_logprobs(logits, targets, None, with_entropy=False)
    assert entropy is None
    assert torch.equal(logprobs, whole(logits, targets)[0])
    logprobs.sum().backward()
    assert logits.grad is not None
    right = torch.nn.functional.one_hot(targets, V) - torch.softmax(logits.detach().double(), -1)
    torch.testing.assert_close(logits.grad.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_impossible_tokens(dtype: torch.dtype) -> None:
    """-inf logits, as in a padded vocabulary, count for nothing; a certain token's log-prob is 0."""
    logits = random_logits(3, dtype=dtype)
    logits[:, 5:9] = -math.inf
    logits[2] = -math.inf
    logits[2, 4] = 3.0
    targets = torch.tensor([0, 12, 4])
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = whole(leaf, targets)
    right_logprobs, right_entropy = reference(logits, targets)
    torch.testing.assert_close(logprobs.detach().double(), right_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.detach().double(), right_entropy, rtol=1e-5, atol=1e-5)
    assert (logprobs[2].item(), entropy[2].item()) == (0, 0)

    (logprobs.sum() + 2 * entropy.sum()).backward()
    assert leaf.grad is not None
    assert leaf.grad[:, 5:9].eq(0).all()
    assert leaf.grad[2].eq(0).all()
    possible = [*range(5), *range(9, V)]
    position = torch.tensor([possible.index(0), possible.index(12)])
    right = reference_gradient(logits[:2, possible], position, 1.0, torch.ones(2), 2 * torch.ones(2))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(leaf.grad[:2, possible].double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_common_offset_costs_no_digits(offset: float) -> None:
    logits = (random_logits(8).round(decimals=1) + offset).requires_grad_()
    targets = random_targets(8)
    logprobs, entropy = whole(logits, targets)
    right_logprobs, right_entropy = reference(logits.detach(), targets)
    torch.testing.assert_close(logprobs.detach().double(), right_logprobs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.detach().double(), right_entropy, rtol=2e-6, atol=2e-6)
    logprobs.sum().backward()
    assert logits.grad is not None
    right = reference_gradient(logits, targets, 1.0, torch.ones(8), torch.zeros(8))
    torch.testing.assert_close(logits.grad.double(), right, rtol=0, atol=1e-3)


def test_huge_spread() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1e4, 1e4 - 1]], requires_grad=True)
    logprobs, entropy = whole(logits, torch.tensor([1, 2]))
    p = math.exp(-1) / (1 + math.exp(-1))
    assert logprobs.tolist() == pytest.approx([-2e4, math.log(p)], rel=1e-6)
    assert entropy.tolist() == pytest.approx([0, -p * math.log(p) - (1 - p) * math.log(1 - p)], rel=1e-6)
    (logprobs + entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [-1, 1, 0]


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
        lambda x: torch.cat([x, x + 1], -1)[..., :V],
        lambda x: x[:, :1].expand_as(x),
    ],
    ids=["sequence first", "vocabulary first", "a slice", "expanded"],
)
def test_strides_do_not_matter(strided: Any) -> None:
    logits, targets = strided(random_logits(4, 3, dtype=torch.float64)), random_targets(4, 3)
    assert not logits.is_contiguous()
    results = []
    for source in (logits, logits.contiguous()):
        leaf = source.detach().requires_grad_()
        logprobs, entropy = whole(leaf, targets)
        (logprobs.sum() + entropy.sum()).backward()
        assert leaf.grad is not None
        results.append((logprobs.detach(), entropy.detach(), leaf.grad))
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_logits_are_left_alone(dtype: torch.dtype) -> None:
    leaf = random_logits(5, dtype=dtype).requires_grad_()
    logits = leaf * 1  # not a leaf: an in-place change would go unnoticed by autograd's checks
    before = logits.detach().clone()
    logprobs, entropy = whole(logits, random_targets(5), temperature=0.5)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(logits.detach(), before)


def test_no_positions() -> None:
    logits = torch.zeros(2, 0, V, requires_grad=True)
    logprobs, entropy = whole(logits, torch.zeros(2, 0, dtype=torch.long))
    assert logprobs.shape == entropy.shape == (2, 0)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.shape == (2, 0, V)


@pytest.mark.parametrize("target", [-100, V, 1 << 40])
def test_a_masked_target_may_lie_outside_the_vocabulary(target: int) -> None:
    """Masked positions may hold an ignore index."""
    logits, targets = random_logits(4).requires_grad_(), random_targets(4)
    mask = torch.tensor([1, 1, 1, 0])
    logprobs, entropy = whole(logits, torch.cat([targets[:3], torch.tensor([target])]), loss_mask=mask)
    right_logprobs, right_entropy = whole(logits, targets)
    assert torch.equal(logprobs[:3], right_logprobs[:3])
    assert torch.equal(entropy, right_entropy)
    (found,) = torch.autograd.grad(logprobs[:3].sum(), logits, retain_graph=True)
    (right,) = torch.autograd.grad(right_logprobs[:3].sum(), logits)
    assert torch.equal(found, right)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.zeros(2, 4).long()}, "targets has shape"),
        ({"targets": torch.zeros(2, 3)}, "targets must be integers"),
        ({"targets": torch.zeros(2, 3).bool()}, "targets must be integers"),
        ({"logits": torch.zeros(2, 3, V).long()}, "logits must be floating point"),
        ({"temperature": 0.0}, "temperature=0.0 must be > 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be > 0"),
        ({"temperature": math.nan}, "temperature=nan must be > 0"),
        ({"targets": torch.full((2, 3), V)}, rf"targets holds token id {V}, outside the vocabulary \[0, {V}\)"),
        ({"targets": torch.full((2, 3), -100)}, "targets holds token id -100"),
        ({"vocab_size": V + 1}, f"vocab_size={V + 1} does not fit logits"),
        ({"vocab_size": V - 1, "targets": torch.full((2, 3), V - 1)}, f"outside the vocabulary .0, {V - 1}"),
        ({"loss_mask": torch.ones(3, 2)}, "loss_mask has shape"),
        ({"top_k": 0}, "top_k=0 must be an integer >= 1"),
        ({"top_p": 0.0}, "top_p=0.0 must lie in"),
        ({"top_p": 1.5}, "top_p=1.5 must lie in"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    inputs = {"logits": random_logits(2, 3), "targets": random_targets(2, 3), "tp_group": None}
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprobs(**inputs | changes)


# --- Padding of the vocabulary, and where the gradient is written ---


@pytest.mark.parametrize("garbage", [50.0, -50.0, math.inf, math.nan])
@pytest.mark.parametrize("vocab_size", [1, 9, V - 1, V])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_padding_has_no_probability_and_no_gradient(dtype: torch.dtype, vocab_size: int, garbage: float) -> None:
    """Whatever stands in the columns that only pad the vocabulary."""
    logits, targets = random_logits(2, 4, dtype=dtype), random_targets(2, 4) % vocab_size
    logits[..., vocab_size:] = garbage
    short, padded = logits[..., :vocab_size].clone().requires_grad_(), logits.clone().requires_grad_()
    right = whole(short, targets, temperature=0.7)
    found = whole(padded, targets, temperature=0.7, vocab_size=vocab_size)
    assert [torch.equal(a, b) for a, b in zip(found, right, strict=True)] == [True, True]
    for logprobs, entropy in (found, right):
        (2 * logprobs.sum() - entropy.sum()).backward()
    assert short.grad is not None
    assert padded.grad is not None
    assert torch.equal(padded.grad[..., :vocab_size], short.grad)
    assert padded.grad[..., vocab_size:].eq(0).all()
    if vocab_size == 1:
        assert right[0].eq(0).all()
        assert right[1].eq(0).all()


@pytest.mark.parametrize("vocab_size", [None, 17])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_overwriting_gives_the_same_gradient_in_the_logits_own_storage(
    dtype: torch.dtype, options: dict[str, Any], vocab_size: int | None
) -> None:
    gradients = []
    targets = random_targets(3, 5) % 17
    for overwrite in (True, False):
        leaf = random_logits(3, 5, dtype=dtype).requires_grad_()
        logits = leaf * 1  # as a model's output, no leaf
        before = logits.detach().clone()
        handed_on: list[Tensor] = []
        logits.register_hook(handed_on.append)
        logprobs, entropy = whole(logits, targets, vocab_size=vocab_size, overwrite_logits=overwrite, **options)
        assert torch.equal(logits.detach(), before)  # until backward
        (logprobs.clamp(min=-99).sum() + entropy.sum()).backward()
        (gradient,) = handed_on
        gradients.append(gradient.clone())
        assert (gradient.data_ptr() == logits.data_ptr()) == overwrite
        assert torch.equal(logits.detach(), gradient if overwrite else before)
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)
    assert torch.equal(*gradients)
    assert gradients[0].ne(0).any()


@pytest.mark.parametrize("as_mask", [Tensor.bool, Tensor.float, Tensor.long])
def test_loss_mask_frees_targets_and_nothing_else(as_mask: Any) -> None:
    logits, targets = random_logits(2, 6), random_targets(2, 6)
    mask = torch.arange(12).view(2, 6) % 4 != 1
    right = whole(logits, targets)
    found = whole(logits, targets.masked_fill(~mask, -100), loss_mask=as_mask(mask))
    assert torch.equal(found[0][mask], right[0][mask])
    assert torch.equal(found[1], right[1])
    assert torch.isfinite(found[0]).all()
    with pytest.raises(ValueError, match="targets holds token id -100"):
        whole(logits, targets.masked_fill(mask, -100), loss_mask=as_mask(mask))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_targets_may_be_any_integers(dtype: torch.dtype) -> None:
    logits, targets = random_logits(6).requires_grad_(), random_targets(6)
    logprobs, _ = whole(logits, targets.to(dtype))
    assert torch.equal(logprobs, whole(logits, targets)[0])
    logprobs.sum().backward()
    assert logits.grad is not None
    right = torch.nn.functional.one_hot(targets, V) - torch.softmax(logits.detach(), -1)
    torch.testing.assert_close(logits.grad, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}], ids=str)
def test_memory(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the logits' size is made but their gradient, in their type; top_p has histograms of each token."""
    tokens, columns = 1024, 1 << 14
    monkeypatch.setattr(softmax, "_TILE_ELEMENTS", {"cpu": columns})
    histograms = 5 * 256 * 8 * tokens if options else 0
    logits = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    targets = torch.arange(tokens)
    for overwrite, allowed in ((False, 3.0), (True, 0.1)):
        with Count() as forward:
            logprobs, entropy = whole(logits, targets, overwrite_logits=overwrite, **options)
        assert forward.peak <= 0.1 * logits.numel() + histograms
        loss = logprobs.clamp(min=-99).sum() + entropy.sum()
        with Count() as backward:
            (gradient,) = torch.autograd.grad(loss, logits)
        assert forward.live + backward.peak <= allowed * logits.numel()
        assert gradient.dtype == logits.dtype
        assert (gradient.data_ptr() == logits.data_ptr()) == overwrite


# --- The mathematics of shards, in one process ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["even", "one shard all -inf", "one token each", "far apart"])
def test_shards_merge_to_the_whole(case: str, dtype: torch.dtype) -> None:
    shards = {"one token each": V}.get(case, 4)
    logits = random_logits(9, dtype=dtype)[:, : V - V % shards]
    size = logits.shape[-1] // shards
    if case == "one shard all -inf":
        logits[:, size : 2 * size] = -math.inf
    if case == "far apart":
        logits[:, :size] -= 300
        logits[:, -size:] += 1000
    targets = random_targets(9) % logits.shape[-1]
    if case == "one shard all -inf":
        targets = torch.where(targets // size == 1, 0, targets)

    statistics = []
    for rank, shard in enumerate(logits.split(size, -1)):
        local = softmax.local_targets(targets - rank * size, size, size, None)
        statistics.append(softmax.statistics(shard, local))
    log_normalizer, entropy, logprobs = softmax.merge(torch.stack(statistics))
    tolerance = TOLERANCE[dtype]
    right_logprobs, right_entropy = reference(logits, targets)
    for found, right in ((logprobs, right_logprobs), (entropy, right_entropy)):
        torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        log_normalizer.double(), torch.logsumexp(logits.double(), -1), rtol=tolerance, atol=tolerance
    )


def test_a_shard_far_below_another_weighs_nothing() -> None:
    low, high = torch.zeros(1, 1000), torch.tensor([[3e38]])
    shards = [softmax.statistics(shard, torch.tensor([target])) for shard, target in ((low, -1), (high, 0))]
    _, entropy, logprobs = softmax.merge(torch.stack(shards))
    assert (entropy.item(), logprobs.item()) == (0, 0)


def test_a_shard_of_minus_infinity_has_finite_statistics() -> None:
    stats = softmax.statistics(torch.full((2, 4), -math.inf), torch.zeros(2, dtype=torch.long))
    maximum, total, moment, _ = stats
    assert torch.isfinite(maximum).all()
    assert total.tolist() == moment.tolist() == [0, 0]


# --- The closure for Megatron-Core ---


def closure_inputs(*shape: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits, targets = random_logits(*shape, scale=1.5, dtype=torch.float64), random_targets(*shape)
    drift = (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1) ** 3 * 2.5
    signs = torch.randint(-1, 2, shape, generator=generator)
    return {
        "logits": logits,
        "targets": targets,
        "old_logprobs": reference(logits, targets, 0.8)[0] - drift,
        "advantages": signs * (0.2 + torch.rand(*shape, generator=generator, dtype=torch.float64)),
        "loss_mask": torch.rand(*shape, generator=generator) < 0.8,
        "tp_group": None,
        "temperature": 0.8,
    }


@pytest.mark.parametrize("objective", get_args(Objective))
def test_closure_gradient(objective: str) -> None:
    """grad logits = sum over tokens of -w A (onehot - p) / temperature, with w by plain Python."""
    inputs = closure_inputs(3, 8)
    logits, targets, mask = (inputs[name] for name in ("logits", "targets", "loss_mask"))
    config = PolicyLossConfig(objective=objective)  # type: ignore[arg-type]
    leaf = logits.clone().requires_grad_()
    loss_sum, denominator, reported = megatron_loss_func(**inputs | {"logits": leaf}, config=config)
    assert loss_sum.shape == denominator.shape == ()
    assert denominator.dtype == torch.int32
    assert denominator.item() == mask.sum().item()
    loss_sum.backward()

    logprobs, entropy = reference(logits, targets, 0.8)
    expected, value = torch.zeros_like(logits), 0.0
    for row in range(3):
        positions = mask[row].nonzero()[:, 0].tolist()
        columns = (logprobs, inputs["old_logprobs"], inputs["advantages"])
        response = [tuple(column[row, t].item() for column in columns) for t in positions]
        clip = [0.2] * len(positions)
        terms = scalar_terms(objective, response, clip, clip, 3.0)  # type: ignore[arg-type]
        for t, (_, _, advantage), (weight, token_value) in zip(positions, response, terms, strict=True):
            onehot = torch.nn.functional.one_hot(targets[row, t], V)
            slope = (onehot - torch.softmax(logits[row, t] / 0.8, -1)) / 0.8
            expected[row, t] = -weight * advantage * slope
            value += token_value
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-9, atol=1e-12)
    assert loss_sum.item() == pytest.approx(value, rel=1e-10)

    log_ratio = (logprobs - inputs["old_logprobs"])[mask].abs()
    assert reported["maxima"]["log_ratio_max"].item() == pytest.approx(log_ratio.max().item())
    total, count = reported["metrics"]["entropy"]
    assert (total / count).item() == pytest.approx(entropy[mask].mean().item())


def test_closure_without_old_logprobs_is_supervised_learning() -> None:
    inputs: dict[str, Any] = closure_inputs(20) | {"old_logprobs": None, "advantages": torch.ones(20)}
    mask = inputs["loss_mask"]
    leaf = inputs["logits"].clone().requires_grad_()
    config = PolicyLossConfig(objective="no_is")
    loss_sum, denominator, reported = megatron_loss_func(**inputs | {"logits": leaf}, config=config)
    loss_sum.backward()
    other = inputs["logits"].clone().requires_grad_()
    nll = torch.nn.functional.cross_entropy(other[mask] / 0.8, inputs["targets"][mask], reduction="sum")
    nll.backward()
    assert leaf.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-15)
    assert loss_sum.item() == pytest.approx(nll.item(), rel=1e-12)
    assert [value.item() for value in reported["metrics"]["nll"]] == pytest.approx([nll.item(), 16])
    assert denominator.item() == mask.sum().item()
    assert reported["maxima"]["log_ratio_max"].item() == 0


@pytest.mark.parametrize("objective", get_args(Objective))
def test_at_ratio_one_all_objectives_are_the_policy_gradient(objective: str) -> None:
    """Why ASPO does nothing with one update per rollout batch."""
    inputs: dict[str, Any] = closure_inputs(20) | {"old_logprobs": None}
    gradients = []
    for name in (objective, "no_is"):
        leaf = inputs["logits"].clone().requires_grad_()
        config = PolicyLossConfig(objective=name)  # type: ignore[arg-type]
        megatron_loss_func(**inputs | {"logits": leaf}, config=config)[0].backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_closure_passes_on_every_input() -> None:
    inputs = closure_inputs(20)
    inputs["ref_logprobs"] = inputs["old_logprobs"] + 0.3
    inputs["rollout_logprobs"] = inputs["old_logprobs"] - 0.25
    inputs["sequence_ids"] = torch.arange(20) // 5
    config = PolicyLossConfig(aggregation="seq-mean-token-mean", kl_coef=0.1, entropy_coef=0.1)
    _, denominator, reported = megatron_loss_func(**inputs, config=config)
    assert denominator.item() == len({i // 5 for i in inputs["loss_mask"].nonzero()[:, 0].tolist()})
    means = {name: (total / count).item() for name, (total, count) in reported["metrics"].items()}
    assert means["rollout_logprob_diff"] == pytest.approx(0.25)
    logprobs = reference(inputs["logits"], inputs["targets"], 0.8)[0]
    d = (logprobs - inputs["ref_logprobs"])[inputs["loss_mask"]]
    assert means["kl"] == pytest.approx(((-d).exp() - 1 + d).mean().item())


def test_closure_on_an_empty_micro_batch_keeps_the_graph() -> None:
    inputs: dict[str, Any] = closure_inputs(6) | {"loss_mask": torch.zeros(6, dtype=torch.bool)}
    leaf = inputs["logits"].clone().requires_grad_()
    loss_sum, denominator, reported = megatron_loss_func(**inputs | {"logits": leaf}, config=PolicyLossConfig())
    loss_sum.backward()
    assert leaf.grad is not None
    assert leaf.grad.eq(0).all()
    assert (loss_sum.item(), denominator.item(), reported["maxima"]["log_ratio_max"].item()) == (0, 0, 0)
