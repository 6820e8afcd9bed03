"""Prints a rehearsed plan: memory by phase, its largest holders, waits, collectives, seconds and checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from megatron_aspo.tools.planning.engine import active_parameters, engine_parameters
from megatron_aspo.tools.planning.gpus import GIB
from megatron_aspo.tools.planning.layout import data_parallel_size, micro_batches
from megatron_aspo.tools.planning.plan import Plan, remedies
from megatron_aspo.tools.planning.traffic import traffic
from megatron_aspo.tools.rehearsal.events import Trace
from megatron_aspo.tools.rehearsal.memory import Need, all_needs, generator_needs, needs, node_host
from megatron_aspo.tools.rehearsal.step import step_times

HOLDERS = 10
"""Lines of code shown with the memory that they hold at the peak of the fullest phase."""


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=120)


def print_header(plan: Plan) -> None:
    """Print the model, the layout and the notes."""
    console = _console()
    config, shape, parallel = plan.config, plan.shape, plan.config.parallel
    expert = f" EP{parallel.expert}×ETP{parallel.expert_tensor_size}" if parallel.expert > 1 else ""
    data = data_parallel_size(config, plan.world)
    layout = f"TP{parallel.tensor} PP{parallel.pipeline} CP{parallel.context} DP{data}{expert}"
    active = f" ({active_parameters(shape) / 1e9:.1f} B active)" if shape.num_experts else ""
    engine = f", vLLM TP{config.rollout.tensor}" if config.rollout.engine == "vllm" else ""
    console.print(
        f"[bold]{config.name}[/bold]: {engine_parameters(shape, 1) / 1e9:.2f} B parameters{active} on "
        f"{plan.world} × {plan.gpu.name}; {layout}{engine}"
    )
    for note in plan.notes:
        console.print(f"[yellow]note[/yellow]: {note}")


def print_rehearsal(
    traces: Sequence[Trace], plan: Plan, checks: Mapping[str, Sequence[str]], details: bool = False
) -> None:
    """Print the ranks, the seconds, and the checks last.

    Args:
        details: holders of memory, waits and collectives of every phase and rank; else holders of the fullest phase,
            and the rest of an update, once for a stage.
    """
    console = _console()
    for trace in traces:
        title = f"rank {trace.rank}, stage {trace.stage}: {trace.parameters / 1e9:.2f} B parameters, "
        title += f"{trace.micro_batches} micro-batches per update; GiB"
        console.print(_table(title, needs(trace, plan), plan, trace))
        if details:
            for phase in trace.phases:
                _print_holders(trace, phase, console)
                _print_calls(trace, phase, console)
        elif trace.rank == min(other.rank for other in traces if other.stage == trace.stage):
            _print_holders(trace, max(needs(trace, plan), key=lambda need: need.device).phase, console)
            _print_calls(trace, "update", console)
    if generators := generator_needs(plan):
        console.print(_table("a rank that only samples; GiB", generators, plan))
    phase, size = node_host(traces, plan)
    if size:
        console.print(f"host memory of a node: about {size / GIB:.0f} GiB, in {phase}")
    _print_traffic(plan, console)
    _print_times(traces, plan, console)
    _print_remedies(all_needs(traces, plan), plan, console)
    for name, findings in checks.items():
        console.print(f"{'[red]failed[/red]' if findings else '[green]ok[/green]    '} {name}")
        for finding in findings:
            console.print(f"       {finding}", markup=False)


def _table(title: str, rows: Sequence[Need], plan: Plan, trace: Trace | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="dim")
    for column in ("phase", "policy", "engine", "other", "total", "left", "host", "kernels", "waits", "TFLOP"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for need in rows:
        other = sum(size for name, size in need.engine.items() if "assumed" in name)
        engine, left = need.device - need.policy - other, plan.gpu.memory - need.device
        sizes = [f"{size / GIB:.1f}" for size in (need.policy, engine, other, need.device, left, need.host)]
        if need.device > plan.gpu.usable:
            sizes[3] = f"[red]{sizes[3]}[/red]"
        counts = ["", "", ""]
        if trace is not None:
            waits = sum(count for (phase, _, _), count in trace.syncs.items() if phase == need.phase)
            flops = trace.flops.get(need.phase, 0) / 1e12
            counts = [str(trace.kernels.get(need.phase, 0)), str(waits), f"{flops:.0f}"]
        table.add_row(need.phase, *sizes, *counts)
    return table


def _print_holders(trace: Trace, phase: str, console: Console) -> None:
    console.print(f"at the peak of {phase}, GiB by line of code:")
    for line, size in sorted(trace.phases[phase].holders.items(), key=lambda item: -item[1])[:HOLDERS]:
        console.print(f"  {size / GIB:6.2f}  {line}", markup=False)


def _print_calls(trace: Trace, phase: str, console: Console) -> None:
    """Waits and collectives of a rank."""
    waits = {key: count for key, count in trace.syncs.items() if key[0] == phase}
    if waits:
        console.print(f"waits of the host for the device in {phase}:")
    for (_, what, line), count in sorted(waits.items(), key=lambda item: -item[1]):
        console.print(f"  {count:6d}  {what}  {line}", markup=False)
    calls: Counter[tuple[str, int, bool]] = Counter()
    moved: Counter[tuple[str, int, bool]] = Counter()
    for event in trace.events:
        if event.phase == phase and event.kind not in ("compute", "wait"):
            key = event.kind, len(event.ranks), event.asynchronous
            calls[key] += 1
            moved[key] += max(event.sent, event.received)
    if calls:
        console.print(f"collectives and messages of {phase}:")
    for (kind, ranks, asynchronous), count in calls.most_common():
        size, how = moved[kind, ranks, asynchronous] / GIB, ", asynchronous" if asynchronous else ""
        console.print(f"  {count:6d}  {kind} of {ranks} ranks: {size:.2f} GiB{how}", markup=False)


def _print_traffic(plan: Plan, console: Console) -> None:
    moved = traffic(plan.config, plan.shape, plan.world)
    console.print(
        f"a training rank receives at most {moved.samples / 1e6:.1f} MB of samples a step, from {moved.senders} ranks"
    )
    if plan.config.rollout.ranks:
        console.print(
            f"at a refit it sends at most {moved.sent / 1e9:.2f} GB over {moved.lanes} connections; a rank that only "
            f"samples stages {moved.staged_once / 1e9:.2f} GB from {moved.rollout_lanes} connections in host memory, "
            f"{moved.staged / 1e9:.2f} GB for all versions that may wait"
        )


def _print_remedies(rows: Sequence[Need], plan: Plan, console: Console) -> None:
    full = {need.phase: need.state for need in rows if need.device > plan.gpu.usable}
    for phase, state in full.items():
        console.print(f"lower the memory of {phase} by: {', '.join(remedies(plan.config, phase, state))}", markup=False)


def _print_times(traces: Sequence[Trace], plan: Plan, console: Console) -> None:
    try:
        third, times = (step_times(traces, plan, length) for length in (1 / 3, 1.0))
    except RuntimeError as error:  # the checks say why
        console.print(f"no simulated step: {error}", markup=False)
        return
    console.print(
        f"simulated, not measured: a step has {plan.config.updates_per_step} updates of "
        f"{micro_batches(plan.config, plan.world)} full-length micro-batches a rank"
    )
    for name, each in (("a third of the largest length", third), ("the largest length", times)):
        console.print(f"samples of {name}, {each.tokens / 1e6:.1f} M tokens:")
        seconds = ", ".join(f"{phase} {_range(ends)}" for phase, ends in each.seconds.items() if ends[1])
        console.print(f"  {_range(each.step)} s: {seconds}")
        mfu, hardware = _range(each.mfu, 100), _range(each.hardware_utilisation, 100)
        speed = _range(each.tokens_per_second_per_gpu)
        console.print(
            f"  bubble {_range(each.bubble, 100)} %, MFU {mfu} %, with recomputation {hardware} %, {speed} tokens/s/GPU"
        )
    for kind, exposed in sorted(times.exposed.items(), key=lambda item: -item[1][1]):
        if max(*exposed, *times.hidden[kind]) >= 0.1:
            console.print(f"  {_range(exposed)} s exposed, {_range(times.hidden[kind])} s hidden: {kind}", markup=False)
    if times.untraced:
        console.print(f"  equal stages stand for {times.untraced} stages without a trace")


def _range(ends: tuple[float, float], factor: float = 1.0) -> str:
    low, high = (factor * end for end in ends)
    digits = 0 if high >= 10 else 1
    return f"{low:.{digits}f}-{high:.{digits}f}"
