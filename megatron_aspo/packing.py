"""From samples to packed streams: balance over ranks, shift labels once, concatenate, pad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from megatron_aspo.types import MicroBatch, Sample


def pack(
    samples: Sequence[Sample],
    *,
    dp_rank: int,
    dp_size: int,
    max_tokens: int,
    multiple: int = 1,
    one_per_row: bool = False,
    equal_length: bool = False,
    device: torch.device | str = "cpu",
) -> list[MicroBatch]:
    """This rank's micro-batches of a mini-batch; every data-parallel rank gets the same number of them.

    Every rank computes the same assignment from the same samples, so nothing is communicated.

    Args:
        samples: the whole mini-batch, in the same order on every rank.
        dp_rank, dp_size: which share to build.
        max_tokens: upper limit of a stream's length; a longer sample is an error.
        multiple: every stream's length is padded to a multiple of it (sequence parallelism: the
            tensor-parallel size).
        one_per_row: give every sample a stream of its own instead of packing.
        equal_length: pad all streams of all ranks to one length, as a pipeline's fixed message size needs.

    Raises:
        ValueError: a sample is longer than `max_tokens`.
    """
    lengths = [sample.length for sample in samples]
    if samples and _round_up(max(lengths), multiple) > max_tokens:
        raise ValueError(f"a sample of {max(lengths)} tokens exceeds max_tokens={max_tokens}")
    bins = _one_per_bin(len(samples), dp_size) if one_per_row else _balance(lengths, dp_size, max_tokens, multiple)
    totals = [_round_up(max(sum(lengths[i] for i in chosen), 1), multiple) for chosen in bins]
    # Decided for the whole mini-batch, so that every rank reports the same metrics, also one without samples.
    has_rollout = bool(samples) and all(sample.rollout_logprobs is not None for sample in samples)
    mine = range(dp_rank, len(bins), dp_size)
    return [
        _build([samples[i] for i in bins[b]], max(totals) if equal_length else totals[b], has_rollout, device)
        for b in mine
    ]


def _balance(lengths: Sequence[int], dp_size: int, max_tokens: int, multiple: int) -> list[list[int]]:
    """Longest first into the emptiest bin; as few bins (a multiple of `dp_size`) as keep all in bounds."""
    rounds = max(1, math.ceil(sum(lengths) / (max_tokens * dp_size)))
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * dp_size)]
        loads = [0] * len(bins)
        for i in longest_first:
            emptiest = loads.index(min(loads))
            bins[emptiest].append(i)
            loads[emptiest] += lengths[i]
        if _round_up(max(loads), multiple) <= max_tokens:
            return [sorted(chosen) for chosen in bins]
        rounds += 1


def _one_per_bin(count: int, dp_size: int) -> list[list[int]]:
    bins = _round_up(max(count, 1), dp_size)
    return [[i] if i < count else [] for i in range(bins)]


def _build(samples: Sequence[Sample], length: int, has_rollout: bool, device: torch.device | str) -> MicroBatch:
    """Concatenate samples into a stream of `length` tokens, padding as a last segment of its own."""
    ints = {name: np.zeros(length, np.int64) for name in ("tokens", "labels", "position_ids", "sequence_ids")}
    mask = np.zeros(length, np.bool_)
    advantages = np.zeros(length, np.float32)
    rollout_logprobs = np.zeros(length, np.float32)
    boundaries = [0]
    for index, sample in enumerate(samples):
        start, end = boundaries[-1], boundaries[-1] + sample.length
        sequence = np.array(sample.prompt.token_ids + sample.token_ids, np.int64)
        # Position t predicts token t + 1: the response's labels begin at the prompt's last position.
        answer = slice(start + len(sample.prompt.token_ids) - 1, end - 1)
        ints["tokens"][start:end] = sequence
        ints["labels"][start : end - 1] = sequence[1:]
        ints["position_ids"][start:end] = np.arange(sample.length)
        ints["sequence_ids"][start:end] = index
        mask[answer] = True
        advantages[answer] = sample.advantage
        if has_rollout:
            rollout_logprobs[answer] = sample.rollout_logprobs
        boundaries.append(end)
    padding = length - boundaries[-1]
    if padding:
        ints["position_ids"][boundaries[-1] :] = np.arange(padding)
        ints["sequence_ids"][boundaries[-1] :] = len(samples)
        boundaries.append(length)
    to = {name: torch.from_numpy(array).to(device) for name, array in ints.items()}
    return MicroBatch(
        **to,
        loss_mask=torch.from_numpy(mask).to(device),
        advantages=torch.from_numpy(advantages).to(device),
        rollout_logprobs=torch.from_numpy(rollout_logprobs).to(device) if has_rollout else None,
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32, device=device),
        max_seqlen=max(b - a for a, b in pairwise(boundaries)),
    )


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
