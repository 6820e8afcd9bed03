"""torch's check that the shards of a tensor do not overlap, in linear time for Megatron's regular grids.

torch 2.13 compares nearly all pairs of shards if a tensor is cut along several dimensions, and Megatron describes a
matrix of all experts of all layers as one tensor. Qwen3-235B has 24,064 shards of one: 35 s, eight times per rank and
checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import _internals


@contextlib.contextmanager
def grid_checks() -> Iterator[None]:
    """Check grids in linear time in this context, and other shards as torch does."""
    pairwise = _internals._find_nd_overlapping_shards

    def find(shards: list[ShardMetadata], sharded_dims: list[int]) -> tuple[int, int] | None:
        return None if is_grid(shards) else pairwise(shards, sharded_dims)

    _internals._find_nd_overlapping_shards = find
    try:
        yield
    finally:
        _internals._find_nd_overlapping_shards = pairwise


def is_grid(shards: list[ShardMetadata]) -> bool:
    """Whether the shards are different cells of a regular grid, so that no two of them overlap."""
    size = list(shards[0].shard_sizes)
    if 0 in size or any(list(shard.shard_sizes) != size for shard in shards):
        return False
    aligned = all(
        start % length == 0 for shard in shards for start, length in zip(shard.shard_offsets, size, strict=True)
    )
    return aligned and len({tuple(shard.shard_offsets) for shard in shards}) == len(shards)
