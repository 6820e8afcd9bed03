"""Packed streams: every token once, at its position, under every layout."""

import itertools
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from megatron_aspo.batch import MicroBatch, Prompt, Sample
from megatron_aspo.errors import UserError
from megatron_aspo.policy.packing import _balance, pack, stream_part, unpack


def sample(number: int, prompt: int, response: int, with_logprobs: bool = True) -> Sample:
    """A sample whose tokens and log-probs are unique: 100 * number + position."""
    tokens = tuple(100 * number + i for i in range(prompt + response))
    return Sample(
        Prompt(number, "", tokens[:prompt], {}),
        group=0,
        token_ids=np.array(tokens[prompt:], np.int32),
        finish_reason="stop",
        rollout_logprobs=-np.array(tokens[prompt:], np.float32) if with_logprobs else None,
        advantage=number + 0.5,
    )


def tokens_of(sample: Sample) -> tuple[int, ...]:
    return (*sample.prompt.token_ids, *sample.token_ids.tolist())


def random_samples(count: int, longest: int = 30, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    return [sample(i + 1, rng.randint(1, longest // 2), rng.randint(1, longest // 2)) for i in range(count)]


def packed(samples: Sequence[Sample], **settings: Any) -> list[MicroBatch]:
    """`pack` for a single rank by default."""
    return pack(samples, **{"dp_rank": 0, "dp_size": 1, "max_tokens": 96, **settings})


def segments(batch: MicroBatch) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(batch.cu_seqlens.tolist())]


def test_a_stream_by_hand() -> None:
    (batch,) = packed([sample(1, 2, 3), sample(2, 3, 1)], multiple=4)
    assert batch.tokens.tolist() == [100, 101, 102, 103, 104, 200, 201, 202, 203, 0, 0, 0]
    assert batch.labels.tolist() == [101, 102, 103, 104, 0, 201, 202, 203, 0, 0, 0, 0]
    assert batch.loss_mask.tolist() == [i in (1, 2, 3, 7) for i in range(12)]
    assert batch.advantages.tolist() == [0, 1.5, 1.5, 1.5, 0, 0, 0, 2.5, 0, 0, 0, 0]
    assert batch.rollout_logprobs is not None
    assert batch.rollout_logprobs.tolist() == [0, -102, -103, -104, 0, 0, 0, -203, 0, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 12]
    assert batch.max_seqlen == 5
    dtypes = {name: str(getattr(batch, name).dtype) for name in ("tokens", "labels", "cu_seqlens", "loss_mask")}
    expected = {"tokens": "torch.int64", "labels": "torch.int64", "loss_mask": "torch.bool"}
    assert dtypes == expected | {"cu_seqlens": "torch.int32"}
    assert batch.old_logprobs is None
    assert batch.ref_logprobs is None


@pytest.mark.parametrize("one_per_row", [False, True])
@pytest.mark.parametrize("equal_length", [False, True])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("dp_size", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_every_token_once(count: int, dp_size: int, multiple: int, equal_length: bool, one_per_row: bool) -> None:
    samples = random_samples(count)
    settings = {"dp_size": dp_size, "multiple": multiple, "one_per_row": one_per_row, "equal_length": equal_length}
    ranks = [packed(samples, dp_rank=rank, **settings) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) >= 1
    batches = [batch for batches in ranks for batch in batches]
    assert len(batches) < dp_size + max(1, count if one_per_row else count // 2)
    sizes = {batch.tokens.numel() for batch in batches}
    assert all(size % multiple == 0 and 0 < size <= 96 for size in sizes)
    assert len(sizes) == 1 or not equal_length

    found: list[tuple[int, ...]] = []
    by_start = {s.prompt.token_ids[0]: s for s in samples}
    for batch in batches:
        parts = segments(batch)
        assert batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens[-1] == batch.tokens.numel()
        assert batch.max_seqlen == max(part.stop - part.start for part in parts)
        real = [part for part in parts if int(batch.tokens[part.start]) in by_start]
        assert real == parts[: len(real)]
        assert len(parts) - len(real) <= 1  # the padding
        assert len(real) <= 1 or not one_per_row
        for number, part in enumerate(parts):
            length = part.stop - part.start
            assert batch.position_ids[part].tolist() == list(range(length))
            assert batch.sequence_ids[part].tolist() == [number] * length
            if part not in real:
                assert not batch.loss_mask[part].any()
                continue
            origin = by_start[int(batch.tokens[part.start])]
            tokens = tokens_of(origin)
            assert batch.tokens[part].tolist() == list(tokens)
            mask = batch.loss_mask[part]
            assert batch.labels[part][mask].tolist() == list(origin.token_ids)
            assert batch.labels[part][:-1].tolist() == list(tokens[1:])
            assert batch.advantages[part].tolist() == [origin.advantage * m for m in mask.tolist()]
            assert batch.rollout_logprobs is not None
            assert batch.rollout_logprobs[part][mask].tolist() == [-t for t in origin.token_ids]
            found.append(tokens)
    assert sorted(found) == sorted(map(tokens_of, samples))


@pytest.mark.parametrize("context_size", [1, 2, 3])
@pytest.mark.parametrize("dp_size", [1, 2, 5])
@pytest.mark.parametrize("one_per_row", [False, True])
def test_unpacked_every_token_is_back_in_its_place(one_per_row: bool, dp_size: int, context_size: int) -> None:
    samples = [*random_samples(7), sample(8, 3, 0), sample(9, 1, 20)]
    table = torch.zeros(9, 20, dtype=torch.long)
    for dp_rank, context_rank in itertools.product(range(dp_size), range(context_size)):
        context = {"context_rank": context_rank, "context_size": context_size, "multiple": 2 * context_size}
        layout = {"dp_rank": dp_rank, "dp_size": dp_size, "max_tokens": 48, "one_per_row": one_per_row}
        batches = packed(samples, **layout, **context)
        table += unpack(samples, batches, [batch.labels for batch in batches])
    assert table.tolist() == [[*s.token_ids, *[0] * (20 - len(s.token_ids))] for s in samples]


def test_a_token_id_outside_the_vocabulary() -> None:
    samples = [sample(1, 2, 3), sample(2, 3, 4)]  # ids 100 to 104 and 200 to 206
    assert len(packed(samples, vocab_size=207)) == 1
    with pytest.raises(UserError, match=r"prompt 2 has token id 206, outside the vocabulary \[0, 206\)"):
        packed(samples, vocab_size=206)
    samples[0].token_ids[1] = -1
    with pytest.raises(UserError, match="token id -1,"):
        packed(samples, vocab_size=207)


def test_the_assignment_by_hand() -> None:
    """Longest first into the emptiest stream; of equally full streams into the first."""
    samples = [sample(i, 1, length - 1) for i, length in enumerate((4, 9, 4, 7, 2, 7, 3))]
    ranks = [packed(samples, dp_rank=r, dp_size=3, max_tokens=16) for r in range(3)]
    assert [batch.samples for batches in ranks for batch in batches] == [(1, 6), (0, 3, 4), (2, 5)]


def test_thousands_of_samples_are_balanced_at_once() -> None:
    """Time grows roughly linearly with the number of samples. A quadratic search takes 100 times as long for 8 times as
    many."""

    def seconds(count: int) -> float:
        lengths = [random.Random(i).randint(1, 4096) for i in range(count)]

        def once() -> float:
            started = time.process_time()
            _balance(lengths, 8, 8192, 8)
            return time.process_time() - started

        return min(once() for _ in range(5))

    assert seconds(8192) < 30 * seconds(1024)


def _loads(ranks: Sequence[Sequence[MicroBatch]]) -> list[int]:
    return [batch.tokens.numel() for batches in ranks for batch in batches]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dp_size", [1, 3, 4])
def test_balance(dp_size: int, seed: int) -> None:
    """Loads differ by at most the longest sample, and the number of streams is near the minimum."""
    samples = random_samples(60, seed=seed)
    ranks = [packed(samples, dp_rank=r, dp_size=dp_size, max_tokens=128) for r in range(dp_size)]
    loads = _loads(ranks)
    assert sum(loads) == sum(s.length for s in samples)
    assert max(loads) - min(loads) <= max(s.length for s in samples)
    # LPT is within one longest sample of the ideal load, so one round more than the ideal is plenty here.
    assert len(ranks[0]) <= math.ceil(sum(loads) / (128 * dp_size)) + 1


def test_as_few_streams_as_possible() -> None:
    samples = [sample(i, 5, 5) for i in range(8)]
    assert _loads([packed(samples, max_tokens=40)]) == [40, 40]
    assert _loads([packed(samples, dp_rank=r, dp_size=2, max_tokens=40) for r in range(2)]) == [40, 40]
    assert _loads([packed(samples, max_tokens=39)]) == [30, 30, 20]
    assert _loads([packed(samples, max_tokens=80)]) == [80]
    # Only the order longest first fits these into two streams. The limit applies after padding.
    uneven = [sample(i, 1, length - 1) for i, length in enumerate((2, 2, 2, 6))]
    assert _loads([packed(uneven, max_tokens=6)]) == [6, 6]
    assert _loads([packed([sample(1, 2, 3)] * 2, max_tokens=11, multiple=4)]) == [8, 8]


@pytest.mark.parametrize("samples", [[], [sample(1, 2, 2)]], ids=["none", "fewer than ranks"])
@pytest.mark.parametrize("one_per_row", [False, True])
def test_a_rank_without_samples_gets_padding(samples: list[Sample], one_per_row: bool) -> None:
    (batch,) = packed(samples, dp_rank=1, dp_size=2, multiple=4, one_per_row=one_per_row)
    assert batch.tokens.tolist() == [0, 0, 0, 0]
    assert not batch.loss_mask.any()
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert batch.max_seqlen == 4
    if samples:  # the same metrics as on ranks with samples
        assert batch.rollout_logprobs is not None
        assert batch.rollout_logprobs.tolist() == [0, 0, 0, 0]


def test_rollout_logprobs_need_all_samples() -> None:
    samples = [sample(1, 2, 3), sample(2, 2, 3, with_logprobs=False)]
    (batch,) = packed(samples, max_tokens=32)
    assert batch.rollout_logprobs is None


@pytest.mark.parametrize(("max_tokens", "multiple"), [(9, 1), (11, 4)])
@pytest.mark.parametrize("one_per_row", [False, True])
def test_a_sample_that_fits_nowhere(max_tokens: int, multiple: int, one_per_row: bool) -> None:
    with pytest.raises(ValueError, match=f"10 tokens exceeds max_tokens={max_tokens}"):
        packed([sample(1, 5, 5), sample(2, 1, 1)], max_tokens=max_tokens, multiple=multiple, one_per_row=one_per_row)


# --- Context parallelism ---


def test_parts_of_a_stream_by_hand() -> None:
    """Samples of 5 and 3 tokens on two ranks: segments of 8 and 4, chunks of 2 and 1."""
    samples = [sample(1, 2, 3), sample(2, 1, 2)]
    first, second = (packed(samples, multiple=16, context_rank=rank, context_size=2)[0] for rank in range(2))
    assert first.tokens.tolist() == [100, 101, 0, 0, 200, 0, 0, 0]
    assert second.tokens.tolist() == [102, 103, 104, 0, 201, 202, 0, 0]
    assert first.labels.tolist() == [101, 102, 0, 0, 201, 0, 0, 0]
    assert second.labels.tolist() == [103, 104, 0, 0, 202, 0, 0, 0]
    assert first.loss_mask.tolist() == [i in (1, 4) for i in range(8)]
    assert second.loss_mask.tolist() == [i in (0, 1, 4) for i in range(8)]
    assert first.position_ids.tolist() == [0, 1, 6, 7, 0, 3, 0, 3]
    assert second.position_ids.tolist() == [2, 3, 4, 5, 1, 2, 1, 2]
    assert first.advantages.tolist() == [0, 1.5, 0, 0, 2.5, 0, 0, 0]
    assert second.rollout_logprobs is not None
    assert second.rollout_logprobs.tolist() == [-103, -104, 0, 0, -202, 0, 0, 0]
    for part in (first, second):
        assert part.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
        assert part.cu_seqlens.tolist() == [0, 8, 12, 16]
        assert part.max_seqlen == 8


@pytest.mark.parametrize("one_per_row", [False, True])
@pytest.mark.parametrize(("context_size", "multiple"), [(2, 4), (2, 12), (3, 6), (4, 8)])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_every_token_once_over_context_parallel_ranks(
    count: int, context_size: int, multiple: int, one_per_row: bool
) -> None:
    samples = random_samples(count)
    found: list[tuple[int, int]] = []
    for dp_rank in range(2):
        settings = {"dp_rank": dp_rank, "dp_size": 2, "multiple": multiple, "one_per_row": one_per_row}
        parts = [packed(samples, **settings, context_rank=c, context_size=context_size) for c in range(context_size)]
        for streams in zip(*parts, strict=True):
            cu_seqlens = streams[0].cu_seqlens
            assert all(torch.equal(s.cu_seqlens, cu_seqlens) for s in streams)
            assert (cu_seqlens.diff() % (2 * context_size) == 0).all()
            assert int(cu_seqlens[-1]) % multiple == 0
            assert int(cu_seqlens[-1]) <= 96
            assert {s.tokens.numel() for s in streams} == {int(cu_seqlens[-1]) // context_size}
            whole = {name: torch.empty(int(cu_seqlens[-1]), dtype=torch.long) for name in ("tokens", "labels")}
            mask = torch.empty(int(cu_seqlens[-1]), dtype=torch.bool)
            for rank, stream in enumerate(streams):
                where = stream_part(cu_seqlens, rank, context_size)
                assert stream.loss_positions.dtype == torch.int64
                assert stream.loss_positions.tolist() == stream.loss_mask.nonzero()[:, 0].tolist()
                for name, values in whole.items():
                    values[where] = getattr(stream, name)
                mask[where] = stream.loss_mask
            tokens, labels = whole.values()
            found += [(0, t) for t in tokens.tolist() if t]
            found += [(1, t) for t in labels[mask].tolist()]
            assert (labels[mask] == tokens[1:][mask[:-1]]).all()  # the next token, on whichever rank holds it
    expected = [(0, t) for s in samples for t in tokens_of(s)]
    assert sorted(found) == sorted(expected + [(1, t) for s in samples for t in s.token_ids])


def test_the_longest_sample_must_fit_with_its_padding() -> None:
    def sizes(samples: list[Sample], max_tokens: int) -> list[int]:
        return _loads([packed(samples, max_tokens=max_tokens, multiple=4, context_size=2)])

    with pytest.raises(ValueError, match="9 tokens exceeds max_tokens=11"):
        sizes([sample(1, 5, 4)], 11)
    assert sizes([sample(1, 5, 4)], 12) == [6]
    assert sizes([sample(1, 5, 4)] * 2, 23) == [6, 6]
