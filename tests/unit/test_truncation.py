"""Top-k and top-p log-probs against an implementation that sorts."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from truncated_softmax import kept_tokens, least_distance_from_p, truncated_logprobs

from megatron_aspo.loss import softmax, vocab_parallel_logprobs

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_logits(n: int, vocabulary: int, kind: str, seed: int, dtype: torch.dtype) -> Tensor:
    """Every row has a finite logit.

    Args:
        kind: "normal", "ties" (few distinct values), "holes" (-inf logits among ties) or "wide" (±1e4).
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    if kind in ("ties", "holes"):
        logits = logits.round() / 2
    if kind == "wide":
        logits *= 4e3
    if kind == "holes":
        holes = torch.rand(n, vocabulary, generator=generator) < 0.5
        holes[:, seed % vocabulary] = False
        logits[holes] = -math.inf
    return logits.to(dtype)


def both(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy."""
    logprobs, entropy = vocab_parallel_logprobs(logits, targets, None, **options)
    assert entropy is not None
    return logprobs, entropy


def compare(logits: Tensor, targets: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Log-probs, entropy, and the gradient of a mixture of both."""
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, len(targets), generator=generator, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = both(leaf, targets, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.autograd.backward([logprobs, entropy], list(upstream.to(logprobs.dtype)))

    other = logits.to(torch.float64, copy=True).requires_grad_()
    right_logprobs, right_entropy = truncated_logprobs(other, targets, temperature, top_k, top_p)
    inside = right_logprobs > -torch.inf
    ((upstream[0] * right_logprobs)[inside].sum() + (upstream[1] * right_entropy).sum()).backward()

    close = 1e-11 if logits.dtype == torch.float64 else 1e-5
    options: dict[str, Any] = {"rtol": close, "atol": close, "check_dtype": False}
    torch.testing.assert_close(logprobs.detach(), right_logprobs.detach(), **options)
    torch.testing.assert_close(entropy.detach(), right_entropy.detach(), **options)
    assert leaf.grad is not None
    assert other.grad is not None
    step = torch.finfo(logits.dtype).eps  # the gradient is stored in the logits' type
    torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=max(close, step), atol=close)
    removed = ~kept_tokens(logits, temperature, top_k, top_p)
    assert leaf.grad[removed].eq(0).all()
    # A truncated target gives no gradient at all, but what its row's entropy gives.
    only_logprobs = logits.clone().requires_grad_()
    both(only_logprobs, targets, temperature=temperature, top_k=top_k, top_p=top_p)[0].sum().backward()
    assert only_logprobs.grad is not None
    assert only_logprobs.grad[~inside].eq(0).all()


@given(st.data())
@settings(max_examples=150)
def test_the_truncated_distribution_is_the_sorted_ones(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(1, 12), "vocabulary")
    kind = data.draw(st.sampled_from(["normal", "ties", "holes", "wide"]), "kind")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    logits = random_logits(
        data.draw(st.integers(1, 4), "rows"), vocabulary, kind, data.draw(st.integers(0, 999)), dtype
    )
    targets = torch.tensor(
        data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=len(logits), max_size=len(logits)))
    )
    targets = torch.where(logits.gather(1, targets[:, None])[:, 0].isneginf(), logits.argmax(1), targets)
    top_k = data.draw(st.none() | st.integers(1, vocabulary + 3), "top_k")
    top_p = data.draw(st.none() | st.floats(0.01, 1) | st.sampled_from([0.5, 1 - 1e-9, 1.0]), "top_p")
    temperature = data.draw(st.sampled_from([1.0, 0.6, 1.7]), "temperature")
    assume(top_p is None or top_p > 0.9999 or least_distance_from_p(logits, temperature, top_k, top_p) > 1e-5)
    assume(top_p is None or not 0.9999 < top_p < 1 - 1e-9)
    compare(logits, targets, temperature, top_k, top_p)


@pytest.mark.parametrize("tile", [1, 3, None])
@pytest.mark.parametrize(("top_k", "top_p"), [(40, None), (None, 0.8), (100, 0.95), (1, None), (7, 1.0), (3000, 0.5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vocabulary_of_two_thousand(
    dtype: torch.dtype, top_k: int | None, top_p: float | None, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile is not None:  # rows that are worked on at once
        monkeypatch.setattr(softmax, "_TILE_ELEMENTS", {"cpu": tile * 2000})
    compare(random_logits(7, 2000, "normal", 3, dtype), torch.arange(7), 0.9, top_k, top_p)


def logprobs_of(logits: list[float], dtype: torch.dtype = torch.float32, **options: Any) -> list[float]:
    """Of every token of one position."""
    count = len(logits)
    rows = torch.tensor([logits] * count, dtype=dtype)
    return both(rows, torch.arange(count), **options)[0].tolist()


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    third = math.log(1 / 3)
    assert logprobs_of([2.0, 2.0, 1.0, 2.0], top_k=1) == pytest.approx([third, third, -math.inf, third])
    assert logprobs_of([2.0, 2.0, 1.0, 2.0], top_p=0.1) == pytest.approx([third, third, -math.inf, third])
    # Signed zeros are one value.
    assert logprobs_of([0.0, -0.0, -1.0], top_k=1) == pytest.approx([math.log(0.5)] * 2 + [-math.inf])


def test_top_p_is_of_the_mass_that_top_k_left() -> None:
    """Masses 0.4, 0.3, 0.2, 0.1: of the first three the first two have 0.78, of all four 0.7."""
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    alone = logprobs_of(logits, top_p=0.75)
    assert alone == pytest.approx([math.log(4 / 9), math.log(3 / 9), math.log(2 / 9), -math.inf], rel=1e-5)
    both = logprobs_of(logits, top_k=3, top_p=0.75)
    assert both == pytest.approx([math.log(4 / 7), math.log(3 / 7), -math.inf, -math.inf], rel=1e-5)


@pytest.mark.parametrize("top_p", [0.5, 0.99999999, 1 - 1e-15])
@pytest.mark.parametrize("top_k", [2, 3, 4, 1000])
def test_a_limit_that_nothing_reaches_does_not_undo_the_other(top_k: int, top_p: float) -> None:
    """Probabilities may add up to less than a p near 1, and k may exceed the vocabulary."""
    for seed in range(6):
        compare(random_logits(3, 30, "normal", seed, torch.float32), torch.arange(3), 1.0, top_k, top_p)
    found = logprobs_of([5.0, 4.0, -3.0], top_k=top_k, top_p=top_p)
    assert math.isinf(found[1]) == (top_p == 0.5)
    assert math.isinf(found[2]) == (top_p == 0.5 or top_k == 2)


@pytest.mark.parametrize("value", [0.1, -0.1, 1 / 3, -1e-300, 1e300 / 1e270])
def test_float64_logits_between_two_float32_numbers_keep_their_largest(value: float) -> None:
    found = logprobs_of([value, -1e9, -1e9], torch.float64, top_k=1)
    assert found == [0.0, -math.inf, -math.inf]


def test_without_effect_the_result_is_that_of_the_whole_distribution() -> None:
    logits, targets = random_logits(6, 19, "normal", 0, torch.float32), torch.arange(6)
    whole = both(logits, targets)
    for options in ({"top_p": 1.0}, {"top_k": 19}, {"top_k": 10**9}, {"top_k": 19, "top_p": 1.0}):
        found = both(logits, targets, **options)
        assert [torch.equal(a, b) for a, b in zip(found, whole, strict=True)] == [True, True], options


def test_padding_is_no_candidate() -> None:
    """The largest logits stand in padded columns, and count neither in k nor in the mass."""
    logits = torch.cat([random_logits(4, 9, "normal", 2, torch.float32), torch.full((4, 3), 50.0)], 1)
    for options in ({"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.9}):
        leaf = logits.clone().requires_grad_()
        found = both(leaf, torch.arange(4), vocab_size=9, **options)
        right = both(logits[:, :9], torch.arange(4), **options)
        assert [torch.equal(a, b) for a, b in zip(found, right, strict=True)] == [True, True], options
        (found[0].clamp(min=-9) + found[1]).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad[:, 9:].eq(0).all()


def test_no_positions() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    logprobs, entropy = both(logits, torch.zeros(0).long(), top_k=2, top_p=0.5)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 5)
