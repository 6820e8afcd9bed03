"""Log-probs and entropy against float64 softmax."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.counting import Count
from megatron_aspo.loss import softmax, vocab_parallel_logprobs

V = 23
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6}


def random_logits(*shape: int, scale: float = 4.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, V, generator=generator, dtype=torch.float64)).to(dtype)


def random_targets(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(7))


def reference(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy by definition, in float64."""
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    entropy = -torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], entropy


def reference_gradient(
    logits: Tensor, targets: Tensor, temperature: float, grad_logprobs: Tensor, grad_entropy: Tensor
) -> Tensor:
    """Gradient of the definition, by torch's own differentiation."""
    leaf = logits.detach().double().requires_grad_()
    log_p = torch.log_softmax(leaf / temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    logprobs = log_p.gather(-1, targets[..., None])[..., 0]
    return gradient_of(leaf, (grad_logprobs * logprobs).sum() + (grad_entropy * entropy).sum())


def whole(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return vocab_parallel_logprobs(logits, targets, None, **options)


def gradient_of(leaf: Tensor, loss: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("tile", [1, 3, None])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_gradients(
    dtype: torch.dtype, tile: int | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile is not None:  # rows per chunk
        monkeypatch.setattr(softmax, "_TILE_ELEMENTS", {"cpu": tile * V})
    logits, targets = random_logits(3, 5, dtype=dtype).requires_grad_(), random_targets(3, 5)
    logprobs, entropy = whole(logits, targets, temperature=temperature)
    assert logprobs.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference(logits.detach(), targets, temperature)
    tolerance = TOLERANCE[dtype]
    for found, right in zip((logprobs, entropy), expected, strict=True):
        torch.testing.assert_close(found.detach().double(), right, rtol=tolerance, atol=tolerance)

    upstream = random_logits(3, 5, dtype=logprobs.dtype)[..., :2].unbind(-1)
    (gradient,) = torch.autograd.grad([logprobs, entropy], logits, list(upstream))
    assert gradient.dtype == dtype
    right = reference_gradient(logits, targets, temperature, *upstream)
    tolerance = 8e-3 if dtype == torch.bfloat16 else 10 * tolerance  # stored in the logits' type
    torch.testing.assert_close(gradient.double(), right, rtol=tolerance, atol=1e-5 if tolerance > 1e-6 else 1e-12)


@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(which: tuple[bool, bool], temperature: float) -> None:
    targets = random_targets(2, 3)

    def chosen(logits: Tensor) -> tuple[Tensor, ...]:
        both = whole(logits, targets, temperature=temperature)
        return tuple(part for part, wanted in zip(both, which, strict=True) if wanted)

    assert torch.autograd.gradcheck(chosen, (random_logits(2, 3, scale=1.0, dtype=torch.float64).requires_grad_(),))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_impossible_tokens(dtype: torch.dtype) -> None:
    """-inf logits, as in a padded vocabulary, do not contribute; a certain token's log-prob is 0."""
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

    gradient = gradient_of(leaf, logprobs.sum() + 2 * entropy.sum())
    assert gradient[:, 5:9].eq(0).all()
    assert gradient[2].eq(0).all()
    possible = [*range(5), *range(9, V)]
    position = torch.tensor([possible.index(0), possible.index(12)])
    right = reference_gradient(logits[:2, possible], position, 1.0, torch.ones(2), 2 * torch.ones(2))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient[:2, possible].double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_common_offset_costs_no_digits(offset: float) -> None:
    logits = (random_logits(8).round(decimals=1) + offset).requires_grad_()
    targets = random_targets(8)
    logprobs, entropy = whole(logits, targets)
    right_logprobs, right_entropy = reference(logits.detach(), targets)
    torch.testing.assert_close(logprobs.detach().double(), right_logprobs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.detach().double(), right_entropy, rtol=2e-6, atol=2e-6)
    right = reference_gradient(logits, targets, 1.0, torch.ones(8), torch.zeros(8))
    torch.testing.assert_close(gradient_of(logits, logprobs.sum()).double(), right, rtol=0, atol=1e-3)


def test_huge_spread() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1e4, 1e4 - 1]], requires_grad=True)
    logprobs, entropy = whole(logits, torch.tensor([1, 2]))
    p = math.exp(-1) / (1 + math.exp(-1))
    assert logprobs.tolist() == pytest.approx([-2e4, math.log(p)], rel=1e-6)
    assert entropy.tolist() == pytest.approx([0, -p * math.log(p) - (1 - p) * math.log(1 - p)], rel=1e-6)
    assert gradient_of(logits, (logprobs + entropy).sum())[0].tolist() == [-1, 1, 0]


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
        results.append((logprobs.detach(), entropy.detach(), gradient_of(leaf, logprobs.sum() + entropy.sum())))
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
    assert gradient_of(logits, logprobs.sum() + entropy.sum()).shape == (2, 0, V)


# --- Padding of the vocabulary, masks, memory ---


@pytest.mark.parametrize("garbage", [50.0, -50.0, math.inf, math.nan])
@pytest.mark.parametrize("vocab_size", [1, 9, V - 1, V])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_padding_has_no_probability_and_no_gradient(dtype: torch.dtype, vocab_size: int, garbage: float) -> None:
    """The columns that pad the vocabulary may hold any values."""
    logits, targets = random_logits(2, 4, dtype=dtype), random_targets(2, 4) % vocab_size
    logits[..., vocab_size:] = garbage
    short, padded = logits[..., :vocab_size].clone().requires_grad_(), logits.clone().requires_grad_()
    right = whole(short, targets, temperature=0.7)
    found = whole(padded, targets, temperature=0.7, vocab_size=vocab_size)
    assert [torch.equal(a, b) for a, b in zip(found, right, strict=True)] == [True, True]
    gradient = gradient_of(padded, 2 * found[0].sum() - found[1].sum())
    assert torch.equal(gradient[..., :vocab_size], gradient_of(short, 2 * right[0].sum() - right[1].sum()))
    assert gradient[..., vocab_size:].eq(0).all()
    if vocab_size == 1:
        assert right[0].eq(0).all()
        assert right[1].eq(0).all()


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
    right = torch.nn.functional.one_hot(targets, V) - torch.softmax(logits.detach(), -1)
    torch.testing.assert_close(gradient_of(logits, logprobs.sum()), right, rtol=1e-5, atol=1e-6)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No allocation has the logits' size except their gradient, in the logits' type."""
    tokens, columns = 1024, 1 << 14
    monkeypatch.setattr(softmax, "_TILE_ELEMENTS", {"cpu": columns})
    logits = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    targets = torch.arange(tokens)
    with Count() as forward:
        logprobs, entropy = whole(logits, targets)
    assert forward.peak <= 0.1 * logits.numel()
    loss = logprobs.sum() + entropy.sum()
    with Count() as backward:
        gradient = gradient_of(logits, loss)
    assert forward.live + backward.peak <= 3 * logits.numel()
    assert gradient.dtype == logits.dtype


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
