"""Ranks that meet: values travel, and calls that do not fit end the rehearsal with a line of each rank."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_aspo.errors import RunError
from megatron_aspo.tools.rehearsal.events import Event
from megatron_aspo.tools.rehearsal.lockstep import Meeting, Partner


def reduce(group: str, ranks: tuple[int, ...], size: int = 64, line: str = "here:1") -> Event:
    return Event("allreduce", group, ranks, size, size, "float32", detail="SUM", phase="update", line=line)


def run_together(address: Path, calls: dict[int, list[Event]]) -> Meeting:
    """Ranks that post their calls at the same time and wait in each."""
    meeting = Meeting(str(address), list(calls))

    def run(rank: int) -> list[dict[int, bytes]]:
        with Partner(str(address), rank) as partner:
            return [partner.post(call, bytes([rank]), True) for call in calls[rank]]

    with ThreadPoolExecutor() as pool:
        done = [pool.submit(run, rank) for rank in calls]
        failed = [future.exception() for future in done]
    meeting.close()
    if meeting.trouble is None:
        assert done[0].result()[0] == {0: bytes([0]), 1: bytes([1])}
    else:
        assert any(isinstance(error, RunError) for error in failed)
    return meeting


def test_ranks_that_meet(tmp_path: Path) -> None:
    pair = {rank: [reduce("pair", (0, 1, 2)), reduce("pair", (0, 1, 2))] for rank in (0, 1)}
    assert run_together(tmp_path / "a", pair).trouble is None
    resized = {0: pair[0], 1: [pair[1][0], reduce("pair", (0, 1, 2), 32, "other:4")]}
    trouble = str(run_together(tmp_path / "b", resized).trouble)
    assert "differ at call 2" in trouble
    assert "other:4" in trouble
    skipped = {0: pair[0], 1: pair[1][:1]}
    assert "rank 1: is at its end" in str(run_together(tmp_path / "d", skipped).trouble)
    crossed = {0: [reduce("a", (0, 1)), reduce("b", (0, 1))], 1: [reduce("b", (0, 1)), reduce("a", (0, 1))]}
    assert "wait for each other" in str(run_together(tmp_path / "e", crossed).trouble)
