"""Shards of a checkpoint's tensors: grids are checked without comparing pairs, and overlaps are found as by torch."""

from __future__ import annotations

import itertools

import pytest
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import _internals

from megatron_aspo.policy.shard_grid import grid_checks


def grid(*counts: int, sizes: tuple[int, ...]) -> list[ShardMetadata]:
    """Shards of a tensor that is cut into `counts` parts of `sizes`."""
    cells = itertools.product(*map(range, counts))
    return [ShardMetadata([i * n for i, n in zip(cell, sizes, strict=True)], list(sizes), "cpu") for cell in cells]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A pair of shards compared is an entry."""
    pairs: list[int] = []
    check = _internals._check_shard_metadata_pair_overlap
    monkeypatch.setattr(_internals, "_check_shard_metadata_pair_overlap", lambda *pair: pairs.append(1) or check(*pair))
    return pairs


def test_a_grid_is_not_compared_in_pairs(compared: list[int]) -> None:
    """Two halves of 6 experts in 5 layers: torch compares each with nearly all of its half."""
    shards = grid(5, 6, 2, sizes=(1, 1, 1536))
    _internals.validate_non_overlapping_shards_metadata(shards)
    assert len(compared) == 2 * 30 * 29 // 2
    compared.clear()
    with grid_checks():
        _internals.validate_non_overlapping_shards_metadata(shards)
    assert compared == []


@pytest.mark.parametrize(("dimension", "change"), [(0, -1), (1, 64), (2, -768)])
def test_an_overlap_is_found(dimension: int, change: int) -> None:
    shards = grid(5, 6, 2, sizes=(1, 128, 1536))
    shards[13].shard_offsets[dimension] += change
    with grid_checks(), pytest.raises(ValueError, match="overlap"):
        _internals.validate_non_overlapping_shards_metadata(shards)


def test_shards_of_other_sizes_are_compared(compared: list[int]) -> None:
    """Uneven parts along two dimensions, without an overlap."""
    shards = grid(2, 2, sizes=(4, 4))
    for shard in shards:
        shard.shard_sizes = [4 if start == 0 else 3 for start in shard.shard_offsets]
    with grid_checks():
        _internals.validate_non_overlapping_shards_metadata(shards)
    assert len(compared) > 0
