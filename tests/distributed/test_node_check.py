"""The node check that precedes a job, with processes on this host as nodes: it names the faulty node."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run

from megatron_aspo.commands import node_check
from megatron_aspo.commands.node_check import SILENCE, Meeting, find_bad_nodes

pytestmark = pytest.mark.distributed

NAMES = [f"node{number}" for number in range(4)]


def meet(patience: float) -> Meeting:
    return Meeting(int(os.environ["RANK"]), len(NAMES), timedelta(seconds=patience))


def find(folder: Path, bad: int | None) -> dict[str, str]:
    """Corrupt every sum on the node `bad`, as a broken cable would."""
    meeting = meet(60)
    if meeting.rank == bad:
        sound = dist.all_reduce

        def broken(tensor: Any, **options: Any) -> None:
            tensor.add_(1)
            sound(tensor, **options)

        dist.all_reduce = broken
    found = find_bad_nodes(meeting, NAMES, folder)
    meeting.leave(list(range(4)))
    return found


def fall_silent(folder: Path) -> dict[str, str]:
    """The last node passes its own checks and disappears when the nodes sum."""
    meeting = meet(10)
    if meeting.rank < 3:
        found = find_bad_nodes(meeting, NAMES, folder)
        meeting.leave([0, 1, 2])
        return found
    meeting.gather("own", [])
    return {}


def check_slowly(folder: Path) -> dict[str, str]:
    """The first node's own check takes longer than nodes wait for each other, and fails."""
    meeting = meet(5)
    os.environ["NODE_CHECK"] = "sleep 8; echo no driver; false" if meeting.rank == 0 else "true"
    found = find_bad_nodes(meeting, NAMES, folder)
    meeting.leave(list(range(4)))
    return found


def hang(folder: Path) -> dict[str, str]:
    """The third node's own check hangs for longer than nodes wait for each other."""
    meeting = meet(5)
    node_check.NODE_CHECK_LIMIT = timedelta(seconds=8)
    os.environ["NODE_CHECK"] = "sleep 100" if meeting.rank == 2 else "true"
    found = find_bad_nodes(meeting, NAMES, folder)
    meeting.leave(list(range(4)))
    return found


def abort(folder: Path) -> dict[str, str]:
    """The third node's reductions abort their process, as NCCL's watchdog does."""
    meeting = meet(30)
    if meeting.rank == 2:
        dist.all_reduce = lambda *_, **__: os.abort()
    found = find_bad_nodes(meeting, NAMES, folder)
    meeting.leave(list(range(4)))
    return found


def without_sharing(folders: Path) -> dict[str, str]:
    """The third node has a different folder in place of the shared one."""
    meeting = meet(20)
    folder = folders / ("elsewhere" if meeting.rank == 2 else "shared")
    folder.mkdir(exist_ok=True)
    found = find_bad_nodes(meeting, NAMES, folder)
    meeting.leave(list(range(4)))
    return found


@pytest.mark.parametrize("bad", [None, 0, 2])
def test_a_broken_cable(tmp_path: Path, bad: int | None) -> None:
    for found in run(4, find, tmp_path, bad):
        assert list(found) == ([] if bad is None else [NAMES[bad]])
        assert all(reason.count("pair-") == 2 and "instead of" in reason for reason in found.values())


def test_a_node_that_is_gone(tmp_path: Path) -> None:
    assert run(4, fall_silent, tmp_path)[:3] == [{"node3": SILENCE}] * 3


def test_a_slow_first_node_with_a_fault(tmp_path: Path) -> None:
    assert run(4, check_slowly, tmp_path) == [{"node0": "NODE_CHECK ended with 1: no driver"}] * 4


def test_a_check_that_hangs(tmp_path: Path) -> None:
    assert run(4, hang, tmp_path) == [{"node2": "NODE_CHECK did not end in 8 s"}] * 4


def test_a_reduction_that_ends_its_process(tmp_path: Path) -> None:
    for found in run(4, abort, tmp_path):
        assert list(found) == ["node2"]
        assert "its process ended with code -6" in found["node2"]


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    for found in run(4, without_sharing, tmp_path):
        assert list(found) == ["node2"]
        assert "is not shared: canary has nothing, the first node wrote" in found["node2"]
