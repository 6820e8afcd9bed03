"""Weights travel in bounded buckets, and what is not as it was the last time is noticed."""

import pytest
import torch
import torch.distributed as dist

from megatron_aspo.weight_sync import Checksum, Weight, WeightSync, WeightSyncError, buckets, checksum

MODEL = {"embed": (8, 4), "q": (4, 4), "norm": (4,), "huge": (100, 4), "head": (8, 4)}


def weights(**changed: tuple[int, ...]) -> list[Weight]:
    return [(name, torch.ones(shape)) for name, shape in (MODEL | changed).items()]


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


def test_a_bucket_is_made_when_the_one_before_has_been_loaded() -> None:
    events: list[str] = []

    def export() -> object:
        for name, tensor in weights():
            events.append(name)
            yield name, tensor

    WeightSync(bucket_bytes=1).run(export(), lambda bucket: events.append(f"load {bucket[0][0]}"))  # type: ignore[arg-type]
    # One tensor is ahead: it is what showed that the bucket was full.
    assert events[:4] == ["embed", "q", "load embed", "norm"]


def test_the_report_counts() -> None:
    loaded: list[str] = []
    report = WeightSync(bucket_bytes=200).run(weights(), lambda bucket: loaded.extend(name for name, _ in bucket))
    assert loaded == list(MODEL)
    assert (report.tensors, report.buckets, report.bytes, report.largest_bucket) == (5, 4, 1936, 1600)


def test_what_is_not_as_it_was_is_an_error() -> None:
    sync = WeightSync(bucket_bytes=200)
    for _ in range(2):
        sync.run(weights(), lambda bucket: None)
    for wrong, message in (
        (weights()[1:], "1 of 5 tensors are missing: embed"),
        (weights()[2:], "2 of 5 tensors are missing: embed and 1 more"),
        (weights(gate=(1,)), "1 of 5 tensors are new: gate"),
        (weights(q=(4, 5)), r"q is \(4, 5\) torch.float32, and was \(4, 4\) torch.float32 before"),
        ([(name, tensor.bfloat16()) for name, tensor in weights()], r"embed is \(8, 4\) torch.bfloat16"),
        (weights() + weights()[:1], "embed was exported twice"),
        ([], "no weights were exported"),
    ):
        with pytest.raises(WeightSyncError, match=message):
            sync.run(wrong, lambda bucket: None)
    sync.run(weights(), lambda bucket: None)


def test_ranks_with_other_values_or_another_order_of_them_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: list[Weight] = []

    def gather(everyones: list[dict[str, Checksum]], mine: dict[str, Checksum]) -> None:
        everyones[:] = [mine, {name: checksum(tensor) for name, tensor in theirs}]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    sync = WeightSync(bucket_bytes=200, checksum=True)
    ours = [("w", torch.arange(600.0).view(20, 30))]
    theirs[:] = [("w", torch.arange(600.0).view(20, 30))]
    sync.run(ours, lambda bucket: None)
    for other in (torch.arange(600.0).flip(0), torch.arange(600.0).roll(1), torch.arange(600.0) + 1e-3):
        theirs[:] = [("w", other)]
        with pytest.raises(WeightSyncError, match="ranks 0 and 1 have different weights: w"):
            sync.run(ours, lambda bucket: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_a_checksum_is_of_bits_and_of_their_order(dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    bits = values.view(width).tolist()
    plain, ordered = checksum(values)
    assert (plain - sum(bits)) % 2**64 == 0
    assert (ordered - sum(i % 251 * b for i, b in enumerate(bits))) % 2**64 == 0
    assert checksum(torch.cat([values, torch.zeros(3, dtype=dtype)])) == (plain, ordered)
    backwards = checksum(values.view(width).flip(0).view(dtype))
    assert backwards[0] == plain
    assert backwards[1] != ordered
