"""A rehearsal's tape knows memory, values and waits, on fake tensors without Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_aspo.tools.rehearsal import rank
from megatron_aspo.tools.rehearsal.collectives import _carry_values
from megatron_aspo.tools.rehearsal.costs import Costs
from megatron_aspo.tools.rehearsal.engine.load import fuse
from megatron_aspo.tools.rehearsal.engine.registry import functions, state
from megatron_aspo.tools.rehearsal.events import Event
from megatron_aspo.tools.rehearsal.shadows import shadow_of, spread
from megatron_aspo.tools.rehearsal.tape import Tape


@pytest.fixture
def tape() -> Iterator[Tape]:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, Tape(fake, Costs(1e15, 1e12)) as tape:
        yield tape


def values(tensor: torch.Tensor) -> list[Any] | None:
    shadow = shadow_of(tensor)
    return None if shadow is None else rank._real_tolist(shadow)


def test_memory_of_views_and_resized_tensors(tape: Tape) -> None:
    x = torch.empty(100, 4, device="cuda")
    view = x[10:20]
    assert tape.device.live == 1600
    x.resize_(200, 4)
    assert tape.device.live == 3200
    del x
    assert tape.device.live == 3200
    del view
    assert tape.device.live == 0


def test_intermediate_results_of_one_kernel_take_no_memory(tape: Tape) -> None:
    x = torch.empty(1000, device="cuda")
    with tape.phase("step"), tape.one_kernel() as note:
        y = x.exp().log().sqrt()
        note(8000)
    assert (tape.device.live, tape.device.phases["step"].peak, tape.kernels["step"]) == (8000, 8000, 1)
    del y


def test_a_compiled_function_is_one_kernel(tape: Tape, monkeypatch) -> None:
    monkeypatch.setattr(state, "tape_now", lambda: tape)
    with tape.phase("step"):
        fuse(lambda x: x.exp().log())(torch.empty(1000, device="cuda"))
    assert tape.kernels["step"] == 1


@pytest.mark.parametrize(("name", "place"), [("multi_tensor_adam", [[], []]), ("generic_gemm", False)])
def test_a_kernel_does_not_take_a_tensor_of_the_host(tape: Tape, name: str, place: Any) -> None:
    on_device, on_host = torch.empty(16, 16, device="cuda"), torch.empty(16, 16)
    arguments = [on_device, [[on_device], [on_host]]] if place else [on_host, False, on_device, False, None]
    for positional, named in ((arguments, {}), ([], {"bias": on_host})):
        with pytest.raises(RuntimeError, match=rf"{name} gets a tensor \[16, 16\] of the host"):
            functions[name](*positional, **named)


def test_a_copy_on_the_device_does_not_change_the_host_tensor(tape: Tape) -> None:
    host = torch.tensor([1, 2])
    on_device = host.to("cuda")
    on_device.add_(1)
    assert values(on_device) == [2, 3]
    assert values(host) == [1, 2]


def test_pinned_values_are_known(tape: Tape) -> None:
    x = torch.ops.aten._pin_memory.default(torch.tensor([1, 2]))
    assert values(x) == [1, 2]


def test_copies_that_wait(tape: Tape) -> None:
    host, on_device = torch.empty(8), torch.empty(8, device="cuda")
    on_device.copy_(host, non_blocking=True)
    assert not tape.syncs
    on_device.copy_(host)
    assert [what for _, what, _ in tape.syncs] == ["copy between host and device"]


def test_a_list_of_unknown_values_is_a_guess(tape: Tape, monkeypatch) -> None:
    monkeypatch.setattr(rank, "_tapes", [tape])
    assert rank._tolist(torch.empty(1000, device="cuda").exp()[:2]) == [1.0, 1.0]
    assert sum(tape.guessed.values()) == 1


def test_a_tensor_equals_itself_without_a_wait(tape: Tape) -> None:
    """As torch compares addresses first; the values are unknown."""
    x = torch.empty(1000, device="cuda").exp()
    assert torch.equal(x, x)
    assert not tape.syncs
    assert not tape.guessed


def test_values_that_travel(tape: Tape) -> None:
    mine = torch.tensor([3]).to("cuda")
    whole = torch.zeros(4, dtype=torch.int64, device="cuda")
    _carry_values(Event("allgather_base", ranks=(0, 1)), [mine], [whole[:2]])
    assert values(whole) == [3, 3, 0, 0]
    _carry_values(Event("allreduce", ranks=(0, 1), detail="MAX"), [mine], [mine])
    assert values(mine) == [3]
    _carry_values(Event("allreduce", ranks=(0, 1), detail="SUM"), [mine], [mine])
    assert values(mine) == [6]
    on_host = torch.tensor([3])
    _carry_values(Event("allreduce", ranks=(0, 1), detail="SUM cpu"), [on_host], [on_host])
    assert values(on_host) == [6]
    _carry_values(Event("recv", ranks=(0, 1)), [whole], [whole])
    assert values(whole) is None


def test_bytes_of_operators_that_only_write(tape: Tape) -> None:
    x, y = torch.empty(10), torch.empty(10)
    aten, costs = torch.ops.aten, Costs(1e15, 1e12)
    assert costs.of_operator(aten.copy_.default, (x, y), {}, x, [x, y]) == ("elementwise", 0.0, 80)
    assert costs.of_operator(aten.zero_.default, (x,), {}, x, [x]) == ("elementwise", 0.0, 40)
    assert costs.of_operator(aten.add_.Tensor, (x, y), {}, x, [x, y]) == ("elementwise", 0.0, 120)


def test_memory_of_the_host(tape: Tape) -> None:
    on_device = torch.empty(1 << 20, device="cuda")
    with tape.phase("save"):
        copy = on_device.cpu()
        small = torch.zeros(10)
    host = tape.host.phases["save"]
    assert (host.start, host.peak, host.end) == (0, (4 << 20) + 40, (4 << 20) + 40)
    assert (tape.device.phases["save"].start, tape.device.phases["save"].end) == (4 << 20, 4 << 20)
    assert [size for line, size in host.kept.items()] == [(4 << 20) + 40]
    del copy, small
    assert tape.host.live == 0


def test_pinned_memory_is_rounded_up_and_kept(tape: Tape) -> None:
    on_device = torch.empty(1000, device="cuda")
    with tape.phase("save"):
        copies = [on_device.to("cpu", non_blocking=True), torch.empty(5000, dtype=torch.uint8, pin_memory=True)]
        del copies
        again = torch.empty(4096, dtype=torch.uint8, pin_memory=True)
        plain = on_device.to("cpu")
    host = tape.host.phases["save"]
    assert (host.peak, host.end) == (4096 + 8192 + 4000,) * 2
    assert host.kept["torch's cache of freed pinned memory"] == 8192
    del again, plain
    assert tape.host.live == 4096 + 8192


def test_values_of_a_new_tensor_are_unknown_until_they_are_written(tape: Tape) -> None:
    x = torch.empty(4, dtype=torch.int64, device="cuda")
    first = x[:2]
    assert values(x) is None
    assert values(x + 1) is None
    first.copy_(torch.tensor([5, 6]))
    assert values(first) == [5, 6]
    assert values(x) is None
    x[2:].fill_(7)
    assert values(x) == [5, 6, 7, 7]


def test_copies_of_new_tensors_wait_and_take_time(tape: Tape) -> None:
    """A pageable kilobyte of the host, and integers back."""
    with tape.phase("step"):
        on_device = torch.zeros(256).to("cuda")
        torch.zeros(4, dtype=torch.int64).to("cuda", non_blocking=True)
        torch.zeros(4, dtype=torch.int64, device="cuda").cpu()
    assert [what for _, what, _ in tape.syncs] == ["copy between host and device"]
    assert sum(tape.syncs.values()) == 2
    assert tape.kernels["step"] == 4
    assert on_device.device.type == "cuda"


def test_a_router_is_known_by_its_caller(tape: Tape) -> None:
    scores = torch.empty(6, 4, device="cuda")
    assert values(torch.topk(scores, 2)[1]) is None
    frame = compile("torch.topk(scores, 2)", "/x/megatron/core/transformer/moe/router.py", "eval")
    chosen = values(eval(frame, {"torch": torch, "scores": scores})[1])
    assert chosen is not None
    assert sorted(expert for pair in chosen for expert in pair) == [expert for expert in range(4) for _ in range(3)]


def test_an_unequal_routing() -> None:
    """Eight of 128 experts for 4096 tokens: the loads of two ranks differ, and the largest is twice the mean."""
    chosen = [spread(torch.Size((4096, 8)), 128, seed) for seed in (0, 1)]
    loads = [torch.bincount(choice.flatten(), minlength=128) for choice in chosen]
    assert all(len(set(row)) == 8 for row in chosen[0].tolist())
    assert [int(load.sum()) for load in loads] == [4096 * 8] * 2
    assert all(500 <= int(load.max()) <= 512 for load in loads)
    assert loads[0].argmax() != loads[1].argmax()
    assert torch.bincount(spread(torch.Size((64, 2)), 3, 0).flatten()).max() <= 64
    for seed in (None, 0):  # the groups of experts of DeepSeek's router
        assert spread(torch.Size((64, 8, 2)), 32, seed).shape == (64, 8, 2)


def test_values_of_ranks_that_run_together(tape: Tape) -> None:
    mine, theirs = torch.tensor([3]).to("cuda"), {1: [torch.tensor([5])]}
    whole = torch.empty(3, dtype=torch.int64, device="cuda")
    _carry_values(Event("allgather_base", ranks=(0, 1, 2)), [mine], [whole], theirs)
    assert values(whole) == [3, 5, 3]
    _carry_values(Event("broadcast", ranks=(0, 1), peer=1), [mine], [mine], theirs)
    assert values(mine) == [5]
    _carry_values(Event("allreduce", ranks=(1, 2), detail="SUM"), [mine], [mine], {1: [torch.tensor([7])]})
    assert values(mine) == [12]
    _carry_values(Event("allreduce", ranks=(1, 2), detail="MAX"), [mine], [mine], {1: [None]})
    assert values(mine) is None
