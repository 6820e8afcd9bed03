"""From samples to packed streams: balance over ranks, shift labels, concatenate, pad, split for context parallelism."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_aspo.batch import MicroBatch, Sample
from megatron_aspo.errors import UserError


def pack(
    samples: Sequence[Sample],
    *,
    deliver: Callable[[Sequence[Sample], Sequence[int]], Sequence[Sample]] | None = None,
    dp_rank: int,
    dp_size: int,
    max_tokens: int,
    multiple: int = 1,
    context_rank: int = 0,
    context_size: int = 1,
    one_per_row: bool = False,
    equal_length: bool = False,
    rounds: int = 1,
    vocab_size: int | None = None,
    experts: int = 0,
    sequence_rank: int = 0,
    sequence_size: int = 1,
    device: torch.device | str = "cpu",
) -> list[MicroBatch]:
    """This rank's micro-batches of a mini-batch; every data- and context-parallel rank gets the same number of them.

    Every rank computes the same assignment from the lengths of the samples, so nothing else is communicated.

    Args:
        samples: the whole mini-batch, in the same order on every rank.
        deliver: called with the samples and each one's data-parallel rank, returns the samples with the arrays of this
            rank's; None if it has them.
        max_tokens: upper limit of a stream's length, before it is split; a longer sample is an error.
        multiple: every stream's length is padded to a multiple of this (`RunConfig.stream_multiple`).
        context_rank, context_size: the part of each stream to build. Every sample is padded to a multiple of
            2 context_size, which must divide `multiple`.
        one_per_row: give every sample its own stream instead of packing.
        equal_length: pad all streams of all ranks to one length, as a pipeline's fixed message size needs.
        rounds: divisor of the number of micro-batches of a rank, which virtual pipeline stages run by so many.
        vocab_size: upper bound of the token ids, checked here because a check on a GPU waits for the device; None
            skips the check.
        experts: of a layer; 0 ignores the samples' routes, which must be of this stage's layers.
        sequence_rank, sequence_size: the part of the routes to build, as sequence parallelism splits the tokens.

    Raises:
        ValueError: a sample is longer than `max_tokens`.
        UserError: a sample of this rank holds a token id outside [0, vocab_size).
    """
    chunks = 2 * context_size if context_size > 1 else 1
    assert multiple % chunks == 0, f"multiple={multiple} is not a multiple of {chunks}"
    lengths = [_round_up(sample.length, chunks) for sample in samples]
    if samples and _round_up(max(lengths), multiple) > max_tokens:
        longest = max(sample.length for sample in samples)
        raise ValueError(f"a sample of {longest} tokens exceeds max_tokens={max_tokens}")
    if one_per_row:
        bins = _one_per_bin(len(samples), dp_size * rounds)
    else:
        bins = _balance(lengths, dp_size * rounds, max_tokens, multiple)
    totals = [_round_up(max(sum(lengths[i] for i in chosen), 1), multiple) for chosen in bins]
    if deliver is not None:
        dp_ranks = [0] * len(samples)
        for b, chosen in enumerate(bins):
            for i in chosen:
                dp_ranks[i] = b % dp_size
        samples = deliver(samples, dp_ranks)
    # Decided for the whole mini-batch, so that every rank reports the same metrics, also one without samples.
    has_rollout = bool(samples) and all(sample.rollout_logprobs is not None for sample in samples)
    micro_batches: list[MicroBatch] = []
    for b in range(dp_rank, len(bins), dp_size):
        length = max(totals) if equal_length else totals[b]
        chosen = [samples[i] for i in bins[b]]
        columns, bounds = _concatenate(chosen, length, chunks, has_rollout, vocab_size)
        micro_batches.append(_to_rank(columns, bounds, tuple(bins[b]), context_rank, context_size, device))
        if experts and chosen and all(sample.routes is not None for sample in chosen):
            routes = _routes(chosen, bounds, experts)[stream_part(torch.tensor(bounds), context_rank, context_size)]
            part = routes.chunk(sequence_size)[sequence_rank]
            micro_batches[-1].routing = list(part.transpose(0, 1).contiguous().to(device))
    return micro_batches


def unpack(samples: Sequence[Sample], batches: Sequence[MicroBatch], values: Sequence[Tensor]) -> Tensor:
    """Inverse of `pack`: scatters this rank's per-token values into a table of response tokens.

    Every token is on one data- and context-parallel rank, so the sum of the ranks' tables is the table of all samples.

    Args:
        samples: the mini-batch, or its first samples.
        batches: the micro-batches that `pack` made of the mini-batch on this rank.
        values: for the labels of each micro-batch, [..., T / context_size].

    Returns:
        [..., samples, longest response], 0 for tokens of other ranks and behind a response's end.
    """
    longest = max(sample.response_length for sample in samples)
    table = values[0].new_zeros(*values[0].shape[:-1], len(samples), longest)
    # Position t predicts token t + 1: the response's first token is the label of the prompt's last.
    starts = torch.tensor([len(sample.prompt.token_ids) - 1 for sample in samples], device=table.device)
    for batch, labels in zip(batches, values, strict=True):
        segments = torch.tensor(batch.samples, dtype=torch.long, device=table.device)
        rows = segments[batch.sequence_ids[batch.loss_positions]]
        chosen = rows < len(samples)
        rows, positions = rows[chosen], batch.loss_positions[chosen]
        table[..., rows, batch.position_ids[positions] - starts[rows]] = labels[..., positions]
    return table


def stream_part(cu_seqlens: Tensor, context_rank: int, context_size: int) -> Tensor:
    """Indices in the stream of a context-parallel rank's tokens: [T / context_size] int64, ascending.

    Every segment is cut into 2 C chunks, and rank c of C has chunks c and 2 C - 1 - c, so all ranks have equal shares
    of a causal mask. Transformer Engine's attention and rotary embedding expect this layout
    (`thd_get_partitioned_indices`).
    """
    count = int(cu_seqlens[-1]) // context_size
    segments, positions = segment_positions(cu_seqlens, count, context_rank, context_size)
    return cu_seqlens[segments].long() + positions


def segment_positions(cu_seqlens: Tensor, count: int, context_rank: int, context_size: int) -> tuple[Tensor, Tensor]:
    """Segment of each of the `count` = T / context_size tokens of a rank, and its position there, in the order of
    `stream_part`. No step waits for the device."""
    starts = cu_seqlens // context_size
    at = torch.arange(count, device=cu_seqlens.device, dtype=starts.dtype)
    segments = torch.searchsorted(starts[1:], at, right=True)
    positions = at - starts[segments]
    if context_size > 1:
        chunk = (starts.diff() // 2)[segments]
        first, second = context_rank * chunk, (2 * context_size - 2 - context_rank) * chunk
        positions = positions + torch.where(positions < chunk, first, second)
    return segments, positions


def _balance(lengths: Sequence[int], dp_size: int, max_tokens: int, multiple: int) -> list[list[int]]:
    """Assign sample indices to bins: the longest sample goes first, into the emptiest bin.

    The number of bins is the smallest multiple of `dp_size` that keeps every bin within `max_tokens`.
    """
    rounds = max(1, math.ceil(sum(lengths) / (max_tokens * dp_size)))
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * dp_size)]
        heap = [(0, b) for b in range(len(bins))]  # (load, bin): of equal loads the first bin is taken
        for i in longest_first:
            load, emptiest = heap[0]
            bins[emptiest].append(i)
            heapq.heapreplace(heap, (load + lengths[i], emptiest))
        if _round_up(max(heap)[0], multiple) <= max_tokens:
            return [sorted(chosen) for chosen in bins]
        rounds += 1


def _one_per_bin(count: int, dp_size: int) -> list[list[int]]:
    bins = _round_up(max(count, 1), dp_size)
    return [[i] if i < count else [] for i in range(bins)]


def _concatenate(
    samples: Sequence[Sample], length: int, chunks: int, has_rollout: bool, vocab_size: int | None
) -> tuple[dict[str, NDArray[Any]], list[int]]:
    """Per-token columns of a stream of `length` tokens, and the bounds of its segments: the samples, each padded to a
    multiple of `chunks`, and the padding at the end."""
    types = {"tokens": np.int64, "labels": np.int64, "loss_mask": np.bool_, "advantages": np.float32}
    types |= {"weight_versions": np.int32} | ({"rollout_logprobs": np.float32} if has_rollout else {})
    columns: dict[str, NDArray[Any]] = {name: np.zeros(length, dtype) for name, dtype in types.items()}
    bounds = [0]
    for sample in samples:
        start, end = bounds[-1], bounds[-1] + sample.length
        sequence = np.array([*sample.prompt.token_ids, *sample.token_ids], np.int64)
        if vocab_size is not None and len(outside := sequence[(sequence < 0) | (sequence >= vocab_size)]):
            raise UserError(
                f"a sample of prompt {sample.prompt.id} has token id {outside[0]}, outside the vocabulary "
                f"[0, {vocab_size}); rollout.engine and the prompts must use the model's own tokenizer"
            )
        # Position t predicts token t + 1: the response's labels begin at the prompt's last position.
        answer = slice(start + len(sample.prompt.token_ids) - 1, end - 1)
        columns["tokens"][start:end] = sequence
        columns["labels"][start : end - 1] = sequence[1:]
        columns["loss_mask"][answer] = True if sample.versions is None else sample.versions >= 0
        columns["advantages"][answer] = sample.advantage
        if has_rollout and sample.rollout_logprobs is not None:
            columns["rollout_logprobs"][answer] = sample.rollout_logprobs
        columns["weight_versions"][answer] = sample.weight_version if sample.versions is None else sample.versions
        bounds.append(start + _round_up(sample.length, chunks))  # causality hides the padding from the sample
    return columns, bounds if bounds[-1] == length else [*bounds, length]


def _routes(samples: Sequence[Sample], bounds: Sequence[int], experts: int) -> Tensor:
    """The samples' routes in the whole stream, [T, layers, k] uint8.

    A sample's last token and the padding have none, and no loss. They are spread evenly over the experts. A sample's
    last token goes to the same experts in every stream.
    """
    routed = [sample.routes for sample in samples if sample.routes is not None]
    layers, k = routed[0].shape[1:]
    even = np.arange(bounds[-1] * k).reshape(-1, 1, k) % experts
    routes = np.broadcast_to(even, (bounds[-1], layers, k)).astype(np.uint8)
    for start, rows in zip(bounds, routed, strict=False):  # the padding has a segment too
        routes[start : start + len(rows)] = rows
        routes[start + len(rows)] = even[len(rows)]
    return torch.from_numpy(routes)


def _to_rank(
    columns: dict[str, NDArray[Any]],
    bounds: list[int],
    chosen: tuple[int, ...],
    context_rank: int,
    context_size: int,
    device: torch.device | str,
) -> MicroBatch:
    """A context-parallel rank's part of a whole stream, on its device."""
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    segments, positions = segment_positions(cu_seqlens, bounds[-1] // context_size, context_rank, context_size)
    local = cu_seqlens[segments] + positions
    tensors = {name: torch.from_numpy(column)[local] for name, column in columns.items()}
    tensors |= {"sequence_ids": segments, "position_ids": positions.long(), "cu_seqlens": cu_seqlens}
    # Found on the host: on a GPU, `nonzero` waits for the device.
    tensors["loss_positions"] = tensors["loss_mask"].nonzero()[:, 0]
    return MicroBatch(
        **{"rollout_logprobs": None, **{name: tensor.to(device) for name, tensor in tensors.items()}},
        max_seqlen=max(b - a for a, b in pairwise(bounds)),
        samples=chosen,
    )


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


_KEPT: list[Any] = []


def once_per_stream[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: keep the last result, because all layers of a pass see the same stream. `forget_streams` frees it."""
    kept: Any = functools.lru_cache(maxsize=1)(function)
    _KEPT.append(kept)
    return kept


def forget_with_streams(function: Any) -> None:
    """Free a cached function's results, too, when a pass ends: Megatron keeps the rotary angles of 32 lengths."""
    if function not in _KEPT:
        _KEPT.append(function)


def forget_streams() -> None:
    """Free the results of `once_per_stream`. A pass ends with it."""
    for kept in _KEPT:
        kept.cache_clear()
