"""Seconds of kernels, of schedules solved by hand, and of a whole step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_aspo.config.load import load_config
from megatron_aspo.tools.planning.architectures import Shape
from megatron_aspo.tools.planning.engine import decode_seconds
from megatron_aspo.tools.planning.plan import Plan, make_plan
from megatron_aspo.tools.planning.traffic import traffic
from megatron_aspo.tools.rehearsal.costs import Costs
from megatron_aspo.tools.rehearsal.events import Event, Trace
from megatron_aspo.tools.rehearsal.simulation import Network, Times, networks, simulate
from megatron_aspo.tools.rehearsal.step import forward_flops, step_times
from megatron_aspo.tools.rehearsal.tape import Tape

ROOT = Path(__file__).parents[2]

SECOND = 10**9
"""Bytes that take a second between two GPUs of `NETWORK`, also in an all-reduce of two ranks."""

NETWORK = Network(gpus_per_node=1, inside=1e9, between=1e9, latency=0.0)


def compute(seconds: float, phase: str = "update") -> Event:
    return Event("compute", phase=phase, seconds=(seconds, 2 * seconds))


def reduce(work: int, seconds: float, group: str = "pair", asynchronous: bool = False) -> Event:
    size = int(seconds * SECOND)
    return Event("allreduce", group, (0, 2), size, size, asynchronous=asynchronous, work=work, phase="update")


def wait(work: int, phase: str = "update") -> Event:
    return Event("wait", work=work, phase=phase)


def times_of(traces: dict[int, list[Event]], phase: str = "update", end: int = 0) -> dict[int, Times]:
    """Simulated times, whose parts add up to the total."""
    times = simulate(traces, phase, NETWORK, end)
    for time in times.values():
        assert time.total == pytest.approx(time.compute + sum(time.exposed.values()) + time.waiting)
        assert sum(time.cost.values()) == pytest.approx(sum(time.exposed.values()) + sum(time.hidden.values()))
    return times


def parts(time: Times) -> tuple[float, float, float]:
    """Exposed and hidden communication, and waiting for partners."""
    return sum(time.exposed.values()), sum(time.hidden.values()), time.waiting


def test_a_collective_begins_with_its_last_rank() -> None:
    """Rank 0 computes for 1 s and rank 2 for 3 s; then both reduce for 1 s."""
    times = times_of({0: [compute(1), reduce(1, 1)], 2: [compute(3), reduce(1, 1)]})
    assert [times[rank].total for rank in (0, 2)] == [4, 4]
    assert [parts(times[rank]) for rank in (0, 2)] == [(1, 0, 2), (1, 0, 0)]
    assert times_of({0: [compute(1), reduce(1, 1)]}, end=1)[0].total == 3  # the most seconds of computation


@pytest.mark.parametrize(
    ("beside", "total", "expected"),
    [(0, 3, (3, 0, 0)), (1.5, 3, (1.5, 1.5, 0)), (3, 3, (0, 3, 0)), (5, 5, (0, 3, 0))],
)
def test_an_asynchronous_collective(beside: float, total: float, expected: tuple[float, float, float]) -> None:
    """An all-reduce of 3 s is exposed as far as the computation beside it does not last."""
    time = times_of({0: [reduce(5, 3, asynchronous=True), compute(beside), wait(5)]})[0]
    assert (time.total, parts(time)) == (total, expected)


def test_a_late_partner_of_an_asynchronous_collective() -> None:
    """Rank 0 waits from second 1 to 3 for rank 2, and to 4 for the all-reduce."""
    early = [reduce(1, 1, asynchronous=True), compute(1), wait(1)]
    times = times_of({0: early, 2: [compute(3), reduce(1, 1)]})
    assert [parts(times[rank]) for rank in (0, 2)] == [(1, 0, 2), (1, 0, 0)]
    # It comes while rank 0 computes.
    early[1] = compute(3.5)
    assert parts(times_of({0: early, 2: [compute(3), reduce(1, 1)]})[0]) == (0.5, 0.5, 0)


def test_collectives_of_one_group_follow_each_other() -> None:
    """The second all-reduce waits for the first one, of which 1 s is hidden; that is communication and no waiting."""
    time = times_of({0: [reduce(1, 3, asynchronous=True), compute(1), reduce(2, 1), wait(1)]})[0]
    assert (time.total, parts(time)) == (4, (3, 1, 0))
    other = times_of({0: [reduce(1, 3, asynchronous=True), compute(1), reduce(2, 1, "other"), wait(1)]})[0]
    assert (other.total, parts(other)) == (3, (2, 2, 0))


def test_an_asynchronous_call_does_not_wait_for_its_partner() -> None:
    """Rank 2 joins the all-reduce when rank 0's message has come."""
    sent = Event("send", "stages", (0, 2), SECOND, 0, peer=2, work=2, phase="update")
    received = replace(sent, kind="recv", sent=0, received=SECOND, peer=0)
    first = [reduce(1, 1, asynchronous=True), sent, wait(2), wait(1)]
    times = times_of({0: first, 2: [received, wait(2), reduce(1, 1)]})
    assert [times[rank].total for rank in (0, 2)] == [2, 2]
    assert parts(times[0]) == (2, 0, 0)


def pipelined(
    stage: int, stages: int, count: int, forward: float = 1, backward: float = 2, phase: str = "update"
) -> list[Event]:
    """1F1B as Megatron's: messages of no bytes between ranks that are numbered as their stages."""
    events: list[Event] = []
    works = iter(range(1000))

    def exchange(*messages: tuple[str, int]) -> None:
        mine = [(kind, peer, next(works)) for kind, peer in messages if 0 <= peer < stages]
        for kind, peer, work in mine:
            events.append(Event(kind, "stages", tuple(range(stages)), peer=peer, work=work, batch=work, phase=phase))
        events.extend(wait(work, phase) for _, _, work in mine)

    before, after, early = stage - 1, stage + 1, min(stages - 1 - stage, count)
    for _ in range(early):
        exchange(("recv", before))
        events.append(compute(forward, phase))
        exchange(("send", after))
    if early < count:
        exchange(("recv", before))
    for i in range(early, count):
        events.append(compute(forward, phase))
        exchange(("send", after), ("recv", after))
        events.append(compute(backward, phase))
        exchange(("send", before), *([("recv", before)] if i < count - 1 else []))
    for _ in range(early):
        exchange(("recv", after))
        events.append(compute(backward, phase))
        exchange(("send", before))
    return events


@pytest.mark.parametrize(("stages", "count"), [(2, 1), (2, 5), (4, 4), (4, 9)])
def test_the_bubble_of_a_pipeline(stages: int, count: int) -> None:
    """(p - 1) / m of the computation, of 3 s per micro-batch and stage."""
    times = times_of({stage: pipelined(stage, stages, count) for stage in range(stages)})
    assert times[0].compute == 3 * count
    assert times[0].total / times[0].compute - 1 == pytest.approx((stages - 1) / count)


def test_a_pipeline_keeps_the_pace_of_its_slowest_stage() -> None:
    """Stages of 3, 6 and 3 s: the first micro-batch takes 12 s and seven more take 6 s each."""
    scales = (1, 2, 1)
    times = times_of({i: pipelined(i, 3, 8, scale, 2 * scale) for i, scale in enumerate(scales)})
    assert times[0].total == pytest.approx(12 + 7 * 6, rel=0.05)


def test_an_all_to_all_between_nodes_has_one_network_card() -> None:
    """A rank sends 1 of 4 GB within its node and 2 GB between nodes, whatever cards its neighbour has."""
    network = Network(gpus_per_node=2, inside=4e9, between=1e9, latency=0.0)
    exchange = Event("alltoall_base", "experts", (0, 1, 2, 3), 4 * SECOND, 4 * SECOND)
    assert network.seconds(exchange, 0) == 2.0
    assert Network(gpus_per_node=8, inside=4e9, latency=0.0).seconds(exchange, 0) == 0.75


def test_a_network_at_its_best_and_at_its_worst() -> None:
    """9 GB between two nodes of H100: over one card of 50 GB/s, of which 90 or 60 % are reached."""
    message = Event("send", "stages", (0, 8), 9 * SECOND, 0, peer=8)
    best, worst = (network.seconds(message, 0) for network in networks("H100-80GB", 8))
    assert (best, worst) == (pytest.approx(0.2 + 5e-6), pytest.approx(0.3 + 20e-6))
    near = replace(message, peer=1)
    assert networks("A100-80GB", 8)[0].seconds(near, 0) == pytest.approx(9 / 270 + 5e-6)


def test_seconds_of_kernels() -> None:
    costs = Costs(1e15, 1e12)
    assert costs.seconds("gemm", 3e15, 0) == (4, pytest.approx(3 / 0.55))
    assert costs.seconds("gemm_fp8", 2.6e15, 0) == (2, 3.25)
    assert costs.seconds("attention", 2.1e15, 0) == (3.5, 6)
    assert costs.seconds("gemm", 1e12, 63 * 10**10) == (pytest.approx(0.7), pytest.approx(0.9))  # bound by memory
    assert costs.seconds("elementwise", 0, 0) == (2e-6, 6e-6)


@pytest.fixture
def tape() -> Iterator[Tape]:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, Tape(fake, Costs(1e15, 1e12)) as tape:
        yield tape


def test_an_optimizer_on_the_host(tape: Tape) -> None:
    """A gradient of 0.4 GB goes down by PCIe at 50 or 25 GB/s, Adam on the host reads and writes four such tensors at
    60 or 30 GB/s, and the weight goes up again. Only the copies are the GPU's, and moments are made once."""
    gradient = torch.empty(10**8, device="cuda")
    on_host, weight = torch.empty(10**8), torch.empty(10**8)
    with tape.phase("update"):
        on_host.copy_(gradient, non_blocking=True)
        first, second = torch.zeros_like(weight), torch.zeros_like(weight)
        rates: dict[str, Any] = {"lr": 1e-6, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
        lists = [weight], [on_host], [first], [second], [], [torch.ones(())]
        torch._fused_adamw_(*lists, amsgrad=False, maximize=False, **rates)
        gradient.copy_(weight, non_blocking=True)
    copies, adam = 2 * 0.4 / 50, 8 * 0.4 / 60
    assert tape.events[-1].seconds == (
        pytest.approx(copies + adam, rel=1e-3),
        pytest.approx(2 * (copies + adam), rel=1e-3),
    )
    assert tape.kernels["update"] == 2


def step_plan(*settings: str) -> Plan:
    """A run of two stages on one GPU each, and a micro-batch per sample of 64 tokens."""
    sizes = ["model.max_sequence_length=64", "rollout.max_response_tokens=32", "train.max_tokens_per_micro_batch=64"]
    batches = ["rollout.prompts_per_step=16", "rollout.responses_per_prompt=4", "train.mini_batch_prompts=8"]
    layout = ["parallel.tensor=1", "parallel.pipeline=2", "model.dtype=bfloat16", "loss.kl_coef=0", "train.epochs=3"]
    config = load_config(str(ROOT / "examples/demo_chain_sum.yaml"), [*sizes, *batches, *layout, *settings])
    return make_plan(config, config.parallel.model_parallel_size + config.rollout.ranks)


def rehearsed(stage: int, few: int = 2, many: int = 6, stages: int = 2, scale: float = 1) -> Trace:
    """A rank whose micro-batches take 1 s forward and 2 s backward, and whose updates end with 5 s."""
    events = [Event("compute", phase="checkpoint save", seconds=(1, 1))]
    for phase, count in (("first update", few), ("update", many)):
        events += [*pipelined(stage, stages, count, scale, 2 * scale, phase), compute(5, phase)]
    events += pipelined(stage, stages, many, scale, 0, "old log-probs")
    flops = {"first update": 1e15 * few, "update": 1e15 * many}
    return Trace(stage, stage, many, {}, events, {}, {}, flops, {}, 10, first_micro_batches=few)


def test_a_step_of_many_micro_batches() -> None:
    """Six updates of 32 micro-batches at 3 s a stage: 33 of them and the end. Log-probs: 33 s for each of two parts."""
    plan = step_plan("checkpoint.every=10")
    times = step_times([rehearsed(0), rehearsed(1)], plan)
    assert times.tokens == 64 * 64
    assert times.seconds["update"] == (
        pytest.approx(6 * (33 * 3 + 5), abs=0.01),
        pytest.approx(12 * (33 * 3 + 5), abs=0.1),
    )
    assert times.seconds["old log-probs"] == (pytest.approx(66, abs=0.01), pytest.approx(132, abs=0.1))
    assert times.seconds["reference log-probs"] == (0, 0)
    assert times.seconds["checkpoint"] == (pytest.approx(0.1, abs=0.01), pytest.approx(0.1, abs=0.01))
    beside = step_times([rehearsed(0), rehearsed(1)], step_plan("checkpoint.every=10", "checkpoint.asynchronous=true"))
    assert beside.seconds["checkpoint"] == (0.1, 0.1)  # without the writing
    assert times.seconds["checkpoint"][0] > 0.1
    assert times.bubble == (pytest.approx(3 / 104, abs=1e-4), pytest.approx(3 / 104, abs=1e-4))
    assert times.untraced == 0
    assert times.step == tuple(pytest.approx(sum(ends[i] for ends in times.seconds.values())) for i in (0, 1))
    assert times.tokens_per_second_per_gpu == tuple(pytest.approx(4096 / 2 / seconds) for seconds in times.step[::-1])
    assert times.trained_tokens_per_second_per_gpu[1] == pytest.approx(4096 / 2 / (6 * 104 + 66), rel=1e-3)
    # 32 micro-batches of 1e15 operations of a rank take 104 s of an H100 with 989e12 a second.
    assert times.hardware_utilisation[1] == pytest.approx(32e15 / 104 / 989e12, rel=1e-3)


@pytest.mark.parametrize(("every", "share"), [(10, 0.1), (1, 1), (0, 0)])
def test_the_sampler_as_anchor_saves_the_pass_for_old_log_probs(every: int, share: float) -> None:
    """The reference policy's pass stays, as long as the other one."""
    kl = "loss.kl_coef=0.1"
    usual = step_times([rehearsed(0), rehearsed(1)], step_plan(kl))
    settings = [kl, "loss.anchor=rollout", f"train.mismatch_every={every}"]
    anchored = step_times([rehearsed(0), rehearsed(1)], step_plan(*settings))
    for end in (0, 1):
        assert anchored.seconds["old log-probs"][end] == pytest.approx(share * usual.seconds["old log-probs"][end])
        assert anchored.step[end] == pytest.approx(usual.step[end] - (1 - share) * usual.seconds["old log-probs"][end])
    assert usual.seconds["old log-probs"][0] > 60
    assert anchored.seconds["reference log-probs"] == usual.seconds["reference log-probs"]


def test_the_model_s_operations() -> None:
    """Two layers of hidden size 8, two heads of 4, feed-forward 16 and a vocabulary of 10, on samples of 6 tokens."""
    shape = Shape(2, 8, 2, 2, 4, 16, 10, dense_layers=2)
    weights = 2 * (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8) + 10 * 8
    attention = 2 * 2 * (2 * 2 * 4 * 6 / 2)  # layers, heads; two products with half of 6 keys
    assert forward_flops(shape, 100, 6) == 100 * (2 * weights + attention)
    plan = step_plan()
    update = step_times([rehearsed(0), rehearsed(1)], plan)
    operations = 3 * 3 * forward_flops(plan.shape, 4096, 64)
    assert update.mfu[1] == pytest.approx(operations / 2 / 989e12 / update.seconds["update"][0])


def test_a_stage_without_a_trace() -> None:
    """The third of four stages has none, and the first and last take 2/3 of the time: 10 s of fill, and 3 s a batch."""
    plan = step_plan(
        "parallel.pipeline=4", "model.num_layers=10", "parallel.first_stage_layers=2", "parallel.last_stage_layers=2"
    )
    traces = [rehearsed(stage, 4, 8, 4, scale) for stage, scale in ((0, 2 / 3), (1, 1), (3, 2 / 3))]
    times = step_times(traces, plan)
    assert times.untraced == 1
    assert times.seconds["update"][0] == pytest.approx(6 * (10 + 31 * 3 + 5), rel=1e-3)


def test_a_step_of_shorter_samples() -> None:
    """Half as long: half the micro-batches and tokens, and a rollout whose longest response is as long as before."""
    plan = step_plan()
    times = step_times([rehearsed(0), rehearsed(1)], plan, length=0.5)
    assert times.tokens == 2048
    assert times.seconds["update"][0] == pytest.approx(6 * (17 * 3 + 5), abs=0.01)
    assert times.seconds["rollout"] == tuple(sorted(decode_seconds(plan.config, plan.shape, plan.gpu, 2, 0.5)))


def test_ranks_that_only_sample() -> None:
    """They sample and load weights beside the training ranks once a batch may be stale."""
    separate = ["rollout.engine=vllm", "rollout.ranks=2", "rollout.kv_cache_gb=1"]
    for stale in (0, 1):
        plan = step_plan(*separate, f"rollout.max_staleness={stale}")
        times = step_times([rehearsed(0), rehearsed(1)], plan)
        low = {phase: ends[0] for phase, ends in times.seconds.items()}
        sampling = low["rollout"] + low["load"]
        others = sum(low.values()) - sampling
        assert times.step[0] == pytest.approx(max(sampling, others) if stale else sampling + others)
        moved, best = traffic(plan.config, plan.shape, plan.world), 0.9 * 450e9  # four GPUs of a node
        assert low["refit"] == pytest.approx(moved.sent / best)
        assert low["load"] == pytest.approx(moved.loaded / best + moved.staged_once / 50e9, rel=0.01)
        assert times.trained_tokens_per_second_per_gpu[0] > 2 * times.tokens_per_second_per_gpu[0]


def test_chunks_of_stages_shorten_the_bubble() -> None:
    """The micro-batches of the third of four stages, which has no trace, wait half as long for the others."""
    settings = ["parallel.pipeline=4", "model.num_layers=8", "parallel.virtual_pipeline=2", "rollout.engine=vllm"]
    plan = step_plan(*settings, "rollout.kv_cache_gb=1")
    times = step_times([rehearsed(stage, 4, 8, 4) for stage in (0, 1, 3)], plan)
    assert times.seconds["update"][0] == pytest.approx(6 * (32 * 3 + 3 * 3 / 2 + 5), rel=1e-3)


def test_reference_log_probs_exchange_the_weights_once() -> None:
    """6 s of exchange, and 33 s for each of two parts."""
    traces = [rehearsed(0), rehearsed(1)]
    for trace in traces:
        passes = [
            replace(event, phase="reference log-probs") for event in trace.events if event.phase == "old log-probs"
        ]
        trace.events += [compute(6, "reference log-probs"), *passes]
    times = step_times(traces, step_plan("loss.kl_coef=0.1"))
    assert times.seconds["reference log-probs"][0] == pytest.approx(6 + 66, abs=0.01)
