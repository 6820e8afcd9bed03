"""Whether calls of several ranks fit together: planted faults are found and named; and what the command says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_aspo import cli
from megatron_aspo.config.load import load_config
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.tools.planning.gpus import GIB
from megatron_aspo.tools.planning.plan import make_plan
from megatron_aspo.tools.rehearsal import run
from megatron_aspo.tools.rehearsal.agreement import find_troubles
from megatron_aspo.tools.rehearsal.events import Event, Memory, Trace
from megatron_aspo.tools.rehearsal.findings import check, find
from megatron_aspo.tools.rehearsal.memory import node_host
from megatron_aspo.tools.rehearsal.show import print_rehearsal

ROOT = Path(__file__).parents[2]
TENSOR = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
WORLD = (0, 1, 2, 3)


def reduce(group: str, ranks: tuple[int, ...], size: int = 64, line: str = "here:1") -> Event:
    return Event("allreduce", group, ranks, size, size, "float32", detail="SUM", phase="update", line=line)


def message(kind: str, peer: int, batch: int = -1, size: int = 32) -> Event:
    sizes = (size, 0) if kind == "send" else (0, size)
    return Event(kind, "stages", (0, 2), *sizes, "bfloat16", peer=peer, batch=batch, phase="update", line="there:2")


def healthy() -> dict[int, list[Event]]:
    """Four ranks: a reduction over pairs, a message from rank 0 to rank 2 and back, a reduction over all."""
    traces = {rank: [reduce(f"tensor {pair}", pair)] for rank, pair in TENSOR.items()}
    traces[0] += [message("send", 2), message("recv", 2)]
    traces[2] += [message("recv", 0), message("send", 0)]
    for events in traces.values():
        events.append(reduce("world", WORLD, line="last:3"))
    return traces


def test_ranks_that_agree() -> None:
    assert find_troubles(healthy()) == []


def test_ranks_without_a_trace_are_taken_to_comply() -> None:
    traces = healthy()
    assert find_troubles({0: traces[0]}) == []
    assert find_troubles({0: traces[0], 3: traces[3]}) == []


def dropped(traces: dict[int, list[Event]]) -> None:
    del traces[1][0]


def resized(traces: dict[int, list[Event]]) -> None:
    traces[3][0] = replace(traces[3][0], sent=128, received=128)


def other_reduction(traces: dict[int, list[Event]]) -> None:
    traces[2][-1] = replace(traces[2][-1], detail="MAX")


def other_kind(traces: dict[int, list[Event]]) -> None:
    traces[0][0] = replace(traces[0][0], kind="allgather_base")


def extra(traces: dict[int, list[Event]]) -> None:
    traces[2].append(reduce("world", WORLD, line="extra:9"))


def swapped_between_groups(traces: dict[int, list[Event]]) -> None:
    traces[1].reverse()


def forgotten_message(traces: dict[int, list[Event]]) -> None:
    del traces[0][1]


def message_of_another_size(traces: dict[int, list[Event]]) -> None:
    traces[0][1] = message("send", 2, size=33)


def both_receive_first(traces: dict[int, list[Event]]) -> None:
    traces[0][1:3] = reversed(traces[0][1:3])


@pytest.mark.parametrize(
    ("plant", "ranks", "words"),
    [
        (dropped, {0, 1}, "its members differ at call 1"),
        (resized, {2, 3}, "128 bytes"),
        (other_reduction, {0, 1, 2, 3}, "MAX"),
        (other_kind, {0, 1}, "allgather_base"),
        (extra, {0, 1, 2, 3}, "extra:9"),
        (swapped_between_groups, {0, 1, 2, 3}, "wait for each other"),
        (forgotten_message, {0, 1, 2, 3}, "wait for each other"),
        (message_of_another_size, {0, 1, 2, 3}, "wait for each other"),
        (both_receive_first, {0, 1, 2, 3}, "wait for each other"),
    ],
)
def test_planted_faults(plant, ranks: set[int], words: str) -> None:
    traces = healthy()
    plant(traces)
    first = find_troubles(traces)[0]
    assert set(first.ranks) == ranks
    assert words in str(first)


def test_an_asynchronous_collective_blocks_its_group_alone() -> None:
    """Two groups of the same ranks, called in opposite orders: a deadlock only if the first call is waited for."""

    def call(group: str, work: int, asynchronous: bool = True) -> Event:
        return replace(reduce(group, (0, 1), line=f"{group}:1"), asynchronous=asynchronous, work=work)

    waits = [Event("wait", work=1), Event("wait", work=2)]
    assert find_troubles({0: [call("a", 1), call("b", 2), *waits], 1: [call("b", 2), call("a", 1), *waits]}) == []
    early = {0: [call("a", 1), waits[0], call("b", 2)], 1: [call("b", 2), waits[1], call("a", 1)]}
    assert "rank 1: allreduce SUM of 64 bytes float32 on group b" in str(find_troubles(early)[0])
    blocking = {0: [call("a", 1, False), call("b", 2)], 1: [call("b", 2, False), call("a", 1)]}
    assert "wait for each other" in str(find_troubles(blocking)[0])


def test_messages_of_one_batch_have_no_order() -> None:
    traces = healthy()
    traces[0][1:3] = [message("recv", 2, batch=7), message("send", 2, batch=7)]
    traces[2][1:3] = [message("recv", 0, batch=3), message("send", 0, batch=3)]
    assert find_troubles(traces) == []


def test_messages_of_one_batch_between_two_ranks_have_an_order() -> None:
    """Two stages in a ring: both neighbours of a rank are the other rank."""
    small, large = (message(kind, peer, 1, size) for kind, peer, size in (("send", 2, 32), ("send", 2, 64)))
    received = [message("recv", 0, 1, size) for size in (32, 64)]
    assert find_troubles({0: [small, large], 2: received}) == []
    assert "wait for each other" in str(find_troubles({0: [small, large], 2: received[::-1]})[0])


def test_rows_of_an_all_to_all() -> None:
    """Rank 0 sends 3 rows to rank 1, which receives 3: rows received and sent are both indexed by the other rank."""
    exchange = Event("alltoall_base", "experts", (0, 1), dtype="bfloat16", line="dispatch:1")
    traces = {
        0: [replace(exchange, splits=((1, 2), (1, 3)))],
        1: [replace(exchange, splits=((3, 4), (2, 4)))],
    }
    assert find_troubles(traces) == []
    traces[1] = [replace(exchange, splits=((2, 4), (2, 4)))]
    assert "dispatch:1" in str(find_troubles(traces)[0])


def test_rows_of_an_all_to_all_have_one_size() -> None:
    exchange = Event("alltoall_base", "experts", (0, 1), 24, 24, "bfloat16", splits=((1, 2), (1, 2)))
    traces = {0: [exchange], 1: [replace(exchange, splits=((2, 1), (2, 1)))]}
    assert find_troubles(traces) == []
    traces[1] = [replace(traces[1][0], sent=48, received=48)]
    assert "48 bytes" in str(find_troubles(traces)[0])


def test_an_all_to_all_of_equal_parts() -> None:
    exchange = Event("alltoall_base", "experts", (0, 1), 24, 24, "bfloat16")
    assert find_troubles({0: [exchange], 1: [exchange]}) == []
    assert "48 bytes" in str(find_troubles({0: [exchange], 1: [replace(exchange, sent=48, received=48)]})[0])


def test_a_gathering_to_one_rank() -> None:
    """Rank 0 receives what both send."""
    gather = Event("gather", "pair", (0, 1), 64, 128, "float32")
    assert find_troubles({0: [gather], 1: [replace(gather, received=0)]}) == []
    assert find_troubles({0: [gather], 1: [replace(gather, sent=32, received=0)]})


def test_a_name_that_two_groups_have() -> None:
    """Rank 1 takes group "7" for another one than rank 0."""
    troubles = find_troubles({0: [reduce("7", (0, 1))], 1: [reduce("7", (1, 2))]})
    assert "group 7 of ranks [0, 1]" in str(troubles[0])
    assert "rank 1: is at its end" in str(troubles[0])


def test_findings_are_printed_where_no_time_can_be_simulated(capsys) -> None:
    """Only the first of two stages has a trace, and one of its ranks leaves a collective out."""
    config = load_config(str(ROOT / "examples/demo_chain_sum.yaml"), ["parallel.pipeline=2", "parallel.tensor=1"])
    plan = make_plan(config, 4)
    memory = {"update": Memory(), "old log-probs": Memory()}
    traces = [
        Trace(rank, 0, 6, memory, events, {}, {}, {}, {}, 10)
        for rank, events in ((0, [reduce("pair", (0, 1))]), (1, []))
    ]
    print_rehearsal(traces, plan, check(traces, plan))
    printed = " ".join(capsys.readouterr().out.split())
    assert "ranks [0] do not come to the end of update" in printed
    assert "its members differ at call 1" in printed


@pytest.mark.parametrize("phase", ["old log-probs", "first update", "update", "refit"])
def test_a_phase_that_does_not_fit(phase: str) -> None:
    plan = make_plan(load_config(str(ROOT / "examples/demo_chain_sum.yaml"), []), 2)
    memory = {"update": Memory()} | {phase: Memory(peak=plan.gpu.memory)}
    trace = Trace(0, 0, 2, memory, [], {}, {}, {}, {}, 10)
    assert f"rank 0, stage 0, {phase}: " in find([trace], plan)[0]


@pytest.mark.parametrize(("size", "expected"), [(8 << 10, []), (1 << 20, ["48.0 MiB", "dispatcher.py:574"])])
def test_a_layer_may_keep_its_counters(size: int, expected: list[str]) -> None:
    """48 layers keep together what one layer may not: the tokens of each of 128 experts on eight ranks are 8 KiB."""
    plan = make_plan(load_config(str(ROOT / "examples/qwen3_30b_a3b.yaml"), []))
    line = "megatron/core/transformer/moe/token_dispatcher.py:574"
    memory = Memory(end=48 * size, kept={line: 48 * size})
    found = find([Trace(0, 0, 2, {"update": Memory(), "old log-probs": memory}, [], {}, {}, {}, {}, 10)], plan)
    assert len(found) == bool(expected)
    assert all(part in found[0] for part in expected)


@pytest.mark.parametrize(("peak", "code"), [(GIB, 0), (80 * GIB, 1)])
def test_exit_code_of_a_rehearsal(monkeypatch, capsys, peak: int, code: int) -> None:
    """A rank needs 1 or 80 GiB of an H100's."""
    trace = Trace(0, 0, 2, {"update": Memory(peak=peak)}, [], {}, {}, {}, {}, 10)
    asked: list[object] = []
    monkeypatch.setattr(run, "_python_path", lambda: "")
    monkeypatch.setattr(run, "rehearse", lambda plan, ranks, save: asked.append((ranks, save)) or [trace])
    path = str(ROOT / "examples/demo_chain_sum.yaml")
    assert cli.main(["plan", path, "--gpus=2", "--quick", "model.dtype=bfloat16"]) == code
    assert asked == [([0], False)]
    printed = " ".join(capsys.readouterr().out.split())
    assert "on 2 × H100-80GB; TP2 PP1 CP1 DP1" in printed
    assert "ok log-probs can be reproduced" in printed
    assert "fit together" not in printed  # one rank has nobody to disagree with
    assert ("failed every phase fits rank 0, stage 0, update: 83.5 GiB do not fit" in printed) == bool(code)
    assert ("lower the memory of update by: " in printed) == bool(code)


def test_holders_are_those_of_the_fullest_phase(capsys) -> None:
    """The policy takes 40 GiB in an update, and 30 GiB beside a vLLM that is awake and takes 37."""
    plan = make_plan(load_config(str(ROOT / "examples/qwen2_5_32b.yaml"), []))
    memory = {"update": Memory(peak=40 * GIB), "rollout": Memory(peak=30 * GIB)}
    trace = Trace(0, 0, 2, memory, [], {}, {}, {}, {}, 10, engine={"update": "asleep", "rollout": "awake"})
    print_rehearsal([trace], plan, {})
    printed = capsys.readouterr().out
    assert ("at the peak of rollout" in printed, "at the peak of update" in printed) == (True, False)
    print_rehearsal([replace(trace, syncs={("rollout", ".item()", "here:1"): 3})], plan, {}, details=True)
    printed = capsys.readouterr().out
    assert "at the peak of update" in printed
    assert "waits of the host for the device in rollout:\n       3  .item()  here:1" in printed


def test_host_memory_of_a_node() -> None:
    """Eight GPUs with TP 2: two ranks of four replicas save 7 GiB each, while the others keep 1 GiB."""
    plan = make_plan(load_config(str(ROOT / "examples/demo_chain_sum.yaml"), ["parallel.tensor=2"]), 8)
    host = {"update": Memory(GIB, 2 * GIB, GIB), "checkpoint save": Memory(GIB, 7 * GIB, GIB)}
    trace = Trace(0, 0, 2, {}, [], {}, {}, {}, {}, 10, host=host)
    assert node_host([trace], plan) == ("checkpoint save", (2 * 7 + 6) * GIB)
    assert node_host([replace(trace, host={"update": host["update"]})], plan) == ("update", 16 * GIB)
    beside = host | {"update beside the save": Memory(4 * GIB, 9 * GIB, 4 * GIB)}  # with a copy on the ranks that save
    assert node_host([replace(trace, host=beside)], plan) == ("update beside the save", (2 * 9 + 6 * 2) * GIB)


def test_a_rank_outside_the_run() -> None:
    plan = make_plan(load_config(str(ROOT / "examples/demo_chain_sum.yaml"), []), 2)
    with pytest.raises(UserError, match="--ranks=2 is none of the training ranks 0 to 1"):
        run.check_ready(plan, [0, 2])


@pytest.mark.parametrize(("installed", "found"), [("2.20.2", False), ("2.21.0", True)])
def test_the_version_of_transformer_engine(monkeypatch, tmp_path: Path, installed: str, found: bool) -> None:
    """Python of another version than the one that is installed comes from a folder."""
    (tmp_path / "transformer_engine").mkdir()
    monkeypatch.setattr("importlib.metadata.version", lambda name: installed)
    monkeypatch.setenv(run.ENGINE_VARIABLE, str(tmp_path))
    assert (str(tmp_path) in run._python_path()) == found


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [(1, RunError, r"rank 0 of 2 would fail \(exit code 1\): why"), (2, UserError, "^why$")],
)
def test_a_rank_that_fails(monkeypatch, capsys, tmp_path: Path, code: int, error: type, message: str) -> None:
    plan = make_plan(load_config(str(ROOT / "examples/demo_chain_sum.yaml"), []), 2)
    program = tmp_path / "python"
    program.write_text(
        f"#!/bin/sh\ncat >/dev/null\necho '{run.PROGRESS}rank 0: x'\necho where\necho why\nexit {code}\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(run, "_python_path", lambda: "")
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(error, match=message):
        run.rehearse(plan, [0])
    printed = capsys.readouterr().err
    assert f"{run.PROGRESS}rank 0: x\n" in printed
    assert ("where\nwhy\n" in printed) == (code == 1)
