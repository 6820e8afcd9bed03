"""Weights are sent in bounded buckets, and their checksums reveal every difference."""

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.counting import Count
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.rollout.remote import RemoteEngine
from megatron_aspo.rollout.weight_lanes import WeightSender, packed, unpacked
from megatron_aspo.rollout.weight_sync import (
    Checksum,
    Weight,
    WeightSyncError,
    buckets,
    checksum,
    transfer,
)

MODEL = {"embed": (8, 4), "q": (4, 4), "norm": (4,), "huge": (100, 4), "head": (8, 4)}


def weights() -> list[Weight]:
    return [(name, torch.ones(shape)) for name, shape in MODEL.items()]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1, [["embed"], ["q"], ["norm"], ["huge"], ["head"]]),
        (128 + 64, [["embed", "q"], ["norm"], ["huge"], ["head"]]),
        (128 + 64 + 16, [["embed", "q", "norm"], ["huge"], ["head"]]),
        (1 << 20, [["embed", "q", "norm", "huge", "head"]]),
    ],
)
def test_buckets(limit: int, expected: list[list[str]]) -> None:
    assert [[name for name, _ in bucket] for bucket in buckets(weights(), limit)] == expected


def test_a_bucket_is_filled_after_the_one_before_was_loaded() -> None:
    events: list[str] = []

    def export() -> Iterator[Weight]:
        for name, tensor in weights():
            events.append(name)
            yield name, tensor

    transfer(export(), lambda bucket: events.append(f"load {bucket[0][0]}"), 1, with_checksums=False, last={})
    # The export is one tensor ahead, because that tensor did not fit into the bucket.
    assert events[:4] == ["embed", "q", "load embed", "norm"]


@pytest.mark.parametrize("with_checksums", [False, True])
def test_tensors_that_differ_from_the_last_refit_are_refused(
    with_checksums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)

    def sent(tensors: list[Weight], last: dict[str, Checksum]) -> dict[str, Checksum]:
        return transfer(tensors, lambda bucket: None, 200, with_checksums, last)

    last = sent(weights(), {})
    assert sent([(name, tensor + 1) for name, tensor in weights()], last).keys() == MODEL.keys()
    for wrong, message in (
        ([pair for pair in weights() if pair[0] != "q"], "^1 of 5 tensors .*: q$"),
        (weights()[2:], "^2 of 5 tensors .*: embed, q$"),
        ([*weights(), ("gate", torch.ones(1))], "^1 of 5 tensors .*: gate$"),
        ([*weights()[1:], ("embed", torch.ones(4, 8))], "^1 of 5 tensors .*: embed$"),
        ([(name, tensor.bfloat16()) for name, tensor in weights()], "^5 of 5 tensors .*: embed, head, huge$"),
        ([], "^5 of 5 tensors"),
    ):
        with pytest.raises(WeightSyncError, match=message):
            sent(wrong, last)


def test_weights_of_a_version_are_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(WeightSender, "send", lambda self: sent.append(self._source.weight_version))
    policy: Any = SimpleNamespace(weight_version=3)
    channel: Any = SimpleNamespace(receive=lambda: "ready")
    engine = RemoteEngine(policy, RolloutConfig(engine="vllm", ranks=1), channel, AsciiTokenizer())
    for policy.weight_version in (3, 3, 5, 5):
        engine.refit()
    assert sent == [3, 5]


@pytest.mark.parametrize("limit", [1, 1000, 1 << 20])
def test_buckets_hold_every_bit_in_order(limit: int) -> None:
    """The smaller types end at offsets where the larger ones would not be aligned."""
    tensors = [
        ("small", torch.arange(3, dtype=torch.bfloat16)),
        ("transposed", torch.arange(600.0).view(20, 30).T),
        ("scalar", torch.tensor(7, dtype=torch.float64)),
        ("bytes", torch.arange(5, dtype=torch.uint8)),
        ("last", torch.arange(9.0)),
    ]
    buckets = [(layout, flat.clone()) for layout, flat in packed(tensors, limit, torch.device("cpu"), True)]
    assert [list(layout) for layout, _ in buckets] == {
        1: [["small"], ["transposed"], ["scalar"], ["bytes"], ["last"]],
        1000: [["small"], ["transposed"], ["scalar", "bytes", "last"]],
        1 << 20: [[name for name, _ in tensors]],
    }[limit]
    found = dict(weight for layout, flat in buckets for weight in unpacked(flat, layout))
    for name, tensor in tensors:
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert {name: copy for layout, _ in buckets for name, copy in layout.items()} == {
        name: checksum(tensor) for name, tensor in tensors
    }


def test_ranks_with_different_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    remote: list[Weight] = []

    def gather(local: dict[str, Checksum]) -> list[dict[str, Checksum]]:
        return [local, {name: checksum(tensor) for name, tensor in remote}]

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr("megatron_aspo.rollout.weight_sync.gather_objects", gather)
    values = torch.arange(600.0)
    for other in (values, values.flip(0), values.roll(1), values + 1e-3, values.bfloat16(), values[:599]):
        remote[:] = [("w", other)]
        refused = nullcontext() if other is values else pytest.raises(WeightSyncError, match=r"rank 1 .*: w$")
        with refused:
            transfer([("w", values)], lambda bucket: None, 200, with_checksums=True, last={})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [0, 1, 250, 1000, 251 << 13, (251 << 13) + 1, 5_000_000])
def test_a_checksum_depends_on_bits_and_their_order(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size).to(dtype)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    before = tensor.view(integer).clone()
    bits = before.long()
    plain, weighted = int(bits.sum()), int((bits * (torch.arange(size) % 251)).sum())
    assert checksum(tensor) == (dtype, (size,), (plain, weighted))
    assert torch.equal(tensor.view(integer), before)
    backwards = checksum(before.flip(0).view(dtype)).sums
    assert backwards[0] == plain
    assert size < 2 or backwards[1] != weighted


def test_a_checksum_takes_less_than_64_mb() -> None:
    tensor = torch.ones(20_000_000, dtype=torch.bfloat16)
    with Count() as count:
        checksum(tensor)
    assert count.peak < 64e6
