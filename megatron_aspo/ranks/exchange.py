"""The arrays of samples travel point to point, from the ranks that own them to those that need them.

Every rank computes all messages and their sizes from what it knows of each sample, so no sizes are exchanged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.batch import EVERY_RANK, Sample
from megatron_aspo.ranks.gathering import share_ranks, waiting_for_ranks

Layers = Sequence[int] | None
"""Layers of `Sample.routes`; None: all."""


def deliver(
    samples: Sequence[Sample], readers: Sequence[Collection[int]], layers: Sequence[Layers] | None = None
) -> list[Sample]:
    """Return the samples, those that this rank reads with their arrays. Collective, with the same samples everywhere.

    Args:
        readers: ranks that read each sample.
        layers: the layers whose routes each rank of the world reads.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    layers = layers or [None] * world
    read = [i for i, ranks in enumerate(readers) if rank in ranks]
    delivered = list(samples)
    for i in read:
        if samples[i].owner in (rank, EVERY_RANK):
            delivered[i] = _with_layers(samples[i], layers[rank])
    incoming, outgoing = messages(samples, readers, rank)
    if all(sample.owner == EVERY_RANK for sample in samples) or world == 1:
        return delivered
    shared = share_ranks()
    packed: dict[tuple[int, ...], dict[Any, Tensor]] = defaultdict(dict)  # ranks of one replica read the same
    with waiting_for_ranks():
        works: list[Any] = []
        received: list[tuple[list[int], Tensor]] = []
        for owner, chosen in incoming.items():
            size = sum(array_bytes(samples[i], layers[rank]) for i in chosen)
            buffer = torch.empty(size, dtype=torch.uint8)
            works.append(dist.irecv(buffer, owner, group=shared.group))
            received.append((chosen, buffer))
        for reader, chosen in outgoing.items():
            buffers, part = packed[tuple(chosen)], layers[reader]
            kind = part if part is None else tuple(part)
            if kind not in buffers:
                buffers[kind] = pack_arrays([samples[i] for i in chosen], part)
            works.append(dist.isend(buffers[kind], reader, group=shared.group))
        for work in works:
            work.wait()
    for chosen, buffer in received:
        shared.received += buffer.numel()
        filled = unpack_arrays([samples[i] for i in chosen], buffer, layers[rank])
        for i, sample in zip(chosen, filled, strict=True):
            delivered[i] = sample
    return delivered


def messages(
    samples: Sequence[Sample], readers: Sequence[Collection[int]], rank: int
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """The indices of the samples that `rank` receives from each owner, and of those that it sends to each reader."""
    incoming: dict[int, list[int]] = defaultdict(list)
    outgoing: dict[int, list[int]] = defaultdict(list)
    for i, (sample, ranks) in enumerate(zip(samples, readers, strict=True)):
        if sample.owner == rank:
            for reader in ranks:
                if reader != rank:
                    outgoing[reader].append(i)
        elif rank in ranks and sample.owner != EVERY_RANK:
            incoming[sample.owner].append(i)
    return incoming, outgoing


def received_bytes(
    samples: Sequence[Sample], readers: Sequence[Collection[int]], rank: int, layers: Layers = None
) -> int:
    """Bytes that `deliver` brings to a rank."""
    incoming, _ = messages(samples, readers, rank)
    return sum(array_bytes(samples[i], layers) for chosen in incoming.values() for i in chosen)


def array_bytes(sample: Sample, layers: Layers = None) -> int:
    """Bytes of a sample's arrays in a message; no array is needed to know them."""
    per_token = 4 * (1 + (sample.rollout_logprobs is not None) + (sample.versions is not None))
    return per_token * sample.response_length + _padded(_route_bytes(sample, layers))


def pack_arrays(samples: Sequence[Sample], layers: Layers = None) -> Tensor:
    """The samples' arrays as bytes."""
    parts: list[Tensor] = []
    for sample in samples:
        arrays = (sample.token_ids, sample.rollout_logprobs, sample.versions)
        parts += [torch.from_numpy(array.view("uint8")) for array in arrays if array is not None]
        if (routes := _with_layers(sample, layers).routes) is not None:
            size = routes.nbytes
            parts += [torch.from_numpy(routes).reshape(-1), torch.zeros(_padded(size) - size, dtype=torch.uint8)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def unpack_arrays(samples: Sequence[Sample], buffer: Tensor, layers: Layers = None) -> list[Sample]:
    """Inverse of `pack_arrays`: the samples with the arrays that `buffer` holds. They share its memory."""
    start = 0

    def take(size: int, dtype: torch.dtype) -> Any:
        nonlocal start
        start += size
        return buffer[start - size : start].view(dtype).numpy()

    filled: list[Sample] = []
    for sample in samples:
        size = 4 * sample.response_length
        arrays: dict[str, Any] = {"token_ids": take(size, torch.int32)}
        if sample.rollout_logprobs is not None:
            arrays["rollout_logprobs"] = take(size, torch.float32)
        if sample.versions is not None:
            arrays["versions"] = take(size, torch.int32)
        if sample.routes is not None:
            size = _route_bytes(sample, layers)
            _, count, k = sample.routes.shape
            shape = sample.length - 1, count if layers is None else len(layers), k
            arrays["routes"] = take(_padded(size), torch.uint8)[:size].reshape(shape)
        filled.append(replace(sample, **arrays))
    return filled


def without_arrays(sample: Sample) -> Sample:
    """The sample as ranks have it that do not own it."""
    return replace(
        sample,
        token_ids=sample.token_ids[:0],
        rollout_logprobs=None if sample.rollout_logprobs is None else sample.rollout_logprobs[:0],
        versions=None if sample.versions is None else sample.versions[:0],
        routes=None if sample.routes is None else sample.routes[:0],
        text="",
    )


def gather_texts(samples: Sequence[Sample]) -> list[str]:
    """The samples' texts on rank 0; elsewhere an empty list. Collective."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    texts = gather_on_rank_0({i: sample.text for i, sample in enumerate(samples) if sample.owner == rank})
    return [] if rank else [texts.get(i, sample.text) for i, sample in enumerate(samples)]


def gather_on_rank_0(own: dict[int, Any]) -> dict[int, Any]:
    """The union of the ranks' dictionaries on rank 0; elsewhere an empty one. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    gathered: list[Any] | None = None if dist.get_rank() else [None] * dist.get_world_size()
    with waiting_for_ranks():
        dist.gather_object(own, gathered, group=share_ranks().group)
    return {i: each for share in gathered or [] for i, each in share.items()}


def _with_layers(sample: Sample, layers: Layers) -> Sample:
    if sample.routes is None or layers is None:
        return sample
    return replace(sample, routes=sample.routes[:, list(layers)])


def _route_bytes(sample: Sample, layers: Layers) -> int:
    if sample.routes is None:
        return 0
    _, count, k = sample.routes.shape
    return (sample.length - 1) * (count if layers is None else len(layers)) * k


def _padded(size: int) -> int:
    """To whole words, so that what follows can be viewed as numbers of four bytes."""
    return -(-size // 4) * 4
