"""Seconds of a whole step from the traces of its ranks: by phase, with bubble, utilisation and tokens per second.

A trace has few micro-batches and an update of the run has many. The two rehearsed updates have unequal numbers of them
and give a straight line. Nothing here was measured. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_aspo.config.checks import stage_layers
from megatron_aspo.config.run import RunConfig
from megatron_aspo.tools.planning.architectures import Shape
from megatron_aspo.tools.planning.engine import active_parameters, decode_seconds, engine_parameters
from megatron_aspo.tools.planning.layout import micro_batches, training_ranks
from megatron_aspo.tools.planning.plan import Plan
from megatron_aspo.tools.planning.traffic import traffic
from megatron_aspo.tools.rehearsal.events import Trace
from megatron_aspo.tools.rehearsal.simulation import Times, networks, simulate

Range = tuple[float, float]
"""Low and high value that the efficiencies of `costs`, `simulation` and `planning.engine` leave."""

STORAGE = (2e9, 0.5e9)
"""Assumed bytes per second at which a rank writes its part of a checkpoint, at best and at worst."""

PCIE = (50e9, 25e9)
"""Assumed bytes per second from host to GPU, at best and at worst."""

CHECKPOINT_BYTES = 14
"""Per parameter: a 16-bit weight, its float32 master copy and Adam's two moments."""

_TRAINING = ("old log-probs", "reference log-probs", "update")


@dataclass(frozen=True)
class StepTimes:
    """A step whose samples all have `length` times the largest length; pairs are (low, high).

    Attributes:
        tokens: of all prompts and responses, without padding.
        seconds: phase -> range. "update" is all updates of the step; "refit" gathers whole tensors, without
            the engine's copies, and sends them to ranks that only sample; "load" is their part of a refit; "checkpoint"
            is a step's share of one.
        step: seconds. Ranks that only sample do "rollout" and "load" beside the others if `rollout.max_staleness` > 0.
        bubble: share of an update in which a rank waits for others, as a mean over the stages: (p - 1) / (m + p - 1)
            for p equal stages and m micro-batches.
        exposed, hidden: seconds of a step's communication in log-probs and updates that the GPU waits for, and beside
            computation, by kind, as a mean over the stages.
        mfu: operations of the model in the updates, forward and backward, over the bfloat16 peak (also of FP8).
        hardware_utilisation: the same for all operations, those of recomputation too.
        tokens_per_second_per_gpu: `tokens` over `step`, of all GPUs.
        trained_tokens_per_second_per_gpu: `tokens` over log-probs and updates, of the GPUs that train.
        untraced: pipeline stages without a trace, for which a stage of as many layers stands.
    """

    length: float
    tokens: float
    seconds: dict[str, Range]
    step: Range
    bubble: Range
    exposed: dict[str, Range]
    hidden: dict[str, Range]
    mfu: Range
    hardware_utilisation: Range
    tokens_per_second_per_gpu: Range
    trained_tokens_per_second_per_gpu: Range
    untraced: int


def step_times(traces: Sequence[Trace], plan: Plan, length: float = 1.0) -> StepTimes:
    """Times of a step whose samples have `length` times the largest length. Streams stay as long as they are: shorter
    samples need fewer of them, whose attention costs less than here.

    Raises:
        RuntimeError: the traces do not fit together; `agreement.find_troubles` says where.
    """
    config, gpu, ranks = plan.config, plan.gpu, training_ranks(plan.config, plan.world)
    longest = config.model.max_sequence_length * length
    tokens = config.rollout.prompts_per_step * config.rollout.responses_per_prompt * longest
    operations = 3 * forward_flops(plan.shape, tokens, longest) * config.train.epochs / ranks
    rollout = sorted(decode_seconds(config, plan.shape, gpu, plan.world, length))
    ends = [_train(traces, plan, length, end) for end in (0, 1)]
    seconds = [{"rollout": rollout[end]} | ends[end].seconds for end in (0, 1)]
    trained = [sum(phases[name] for name in _TRAINING) for phases in seconds]
    steps = [_step(config, phases) for phases in seconds]
    return StepTimes(
        length=length,
        tokens=tokens,
        seconds={name: (seconds[0][name], seconds[1][name]) for name in seconds[0]},
        step=(steps[0], steps[1]),
        bubble=_range(end.bubble for end in ends),
        exposed={kind: _range(end.exposed[kind] for end in ends) for kind in ends[0].exposed},
        hidden={kind: _range(end.hidden[kind] for end in ends) for kind in ends[0].hidden},
        mfu=_range(_over(operations / gpu.flops, phases["update"]) for phases in seconds),
        hardware_utilisation=_range(_over(end.operations / gpu.flops, end.seconds["update"]) for end in ends),
        tokens_per_second_per_gpu=_range(_over(tokens / plan.world, step) for step in steps),
        trained_tokens_per_second_per_gpu=_range(_over(tokens / ranks, time) for time in trained),
        untraced=config.parallel.pipeline - len({trace.stage for trace in traces}),
    )


def forward_flops(shape: Shape, tokens: float, length: float) -> float:
    """Operations of a forward pass over `tokens` in samples of `length`: 2 per active weight, and causal attention."""
    value = shape.latent.value_dim if shape.latent else shape.head_dim
    # Two products, half masked.
    attention = shape.attention_layers() * shape.num_heads * (shape.head_dim + value) * length
    return tokens * (2 * active_parameters(shape) + attention)


def _step(config: RunConfig, seconds: Mapping[str, float]) -> float:
    sampling = seconds["rollout"] + seconds["load"]
    others = sum(seconds.values()) - sampling
    return max(sampling, others) if config.rollout.ranks and config.rollout.max_staleness else sampling + others


def _over(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _range(values: Iterable[float]) -> Range:
    low, high = sorted(values)
    return low, high


@dataclass(frozen=True)
class _Line:
    """Seconds or operations of any number of micro-batches."""

    fixed: float
    each: float

    @classmethod
    def through(cls, first: float, second: float, trace: Trace) -> _Line:
        """By the values of both updates."""
        few, many = trace.first_micro_batches, trace.micro_batches
        each = (second - first) / (many - few) if many > few else second / many
        return cls(second - each * many, each)

    def at(self, count: int) -> float:
        return self.fixed + self.each * count


@dataclass
class _Training:
    """The phases besides the rollout, at one end of all efficiencies.

    Attributes:
        operations: of a rank in all updates.
    """

    seconds: dict[str, float]
    bubble: float
    exposed: dict[str, float]
    hidden: dict[str, float]
    operations: float


def _train(traces: Sequence[Trace], plan: Plan, length: float, end: int) -> _Training:
    config, trace = plan.config, traces[0]
    network = networks(plan.gpu.name, config.cluster.gpus_per_node if config.cluster else 8)[end]
    events = {trace.rank: trace.events for trace in traces}
    phases = ("old log-probs", "reference log-probs", "first update", "update")
    old, reference, first, second = (simulate(events, phase, network, end) for phase in phases)

    def alone(phase: str, rank: int) -> float:
        """Seconds of a phase whose other ranks need not be traced."""
        return simulate({rank: events[rank]}, phase, network, end)[rank].total

    updates, batches = config.updates_per_step, config.mini_batches_per_step
    count = micro_batches(config, plan.world)
    count = max(1, math.ceil(count * length)) if config.train.packing else count
    ranks = _rank_of_stages(traces, stage_layers(plan.shape.num_layers, config.parallel))
    busy = [_Line.through(_busy(first[rank]), _busy(second[rank]), trace) for rank in ranks]
    chunks = config.parallel.virtual_pipeline
    update = _pipeline(busy, count, chunks)
    if len(set(ranks)) == len(ranks):
        update = _Line.through(_longest(first), _longest(second), trace).at(count)
    forward = _pipeline([_Line(0.0, _busy(old[rank]) / trace.micro_batches) for rank in ranks], count, chunks)
    # With the sampler as anchor only some steps have the pass for old log-probs, to measure the mismatch.
    every = config.train.mismatch_every if config.loss.anchor == "rollout" else 1
    share = 1 / every if every else 0.0
    passes = share + bool(config.loss.kl_coef)

    def communication(part: Callable[[Times], Mapping[str, float]]) -> dict[str, float]:
        kinds = sorted({kind for times in (old, second) for time in times.values() for kind in time.cost})
        return {kind: max(0.0, _mean(seconds_of(part, kind, rank) for rank in ranks)) for kind in kinds}

    def seconds_of(part: Callable[[Times], Mapping[str, float]], kind: str, rank: int) -> float:
        """Seconds of communication of one kind in a step of a rank."""
        before, after, logprobs = (part(times[rank]).get(kind, 0.0) for times in (first, second, old))
        in_updates = _Line.through(before, after, trace).at(count)
        return updates * in_updates + passes * batches * logprobs / trace.micro_batches * count

    operations = {t.rank: _Line.through(t.flops.get("first update", 0), t.flops.get("update", 0), t) for t in traces}
    model = engine_parameters(plan.shape, 1)
    exports, load = [alone("refit", rank) for rank in ranks], 0.0
    if separate := config.rollout.ranks:
        # A rank sends its share of its stage, and the rollout ranks broadcast what they have staged.
        moved, sampling = traffic(config, plan.shape, plan.world), tuple(range(plan.world - separate, plan.world))
        refit = max(exports) + moved.sent / network.bandwidth((0, plan.world - 1))
        load = moved.loaded / network.bandwidth(sampling) + moved.staged_once / PCIE[end]
    else:  # a trace exports its own stage's tensors, and all ranks take part in every stage's export
        refit = sum(exports)
    written = CHECKPOINT_BYTES * model / training_ranks(config, plan.world) / STORAGE[end]
    save = max(alone("checkpoint save", rank) for rank in events) + written * (not config.checkpoint.asynchronous)
    exchange = max(0.0, _longest(reference) - _longest(old))  # of the reference's weights, once for all mini-batches
    seconds = {
        "old log-probs": share * batches * forward,
        "reference log-probs": batches * forward + exchange if config.loss.kl_coef else 0.0,
        "update": updates * update,
        "refit": refit,
        "load": load,
        "checkpoint": save / config.checkpoint.every if config.checkpoint.every else 0.0,
    }
    return _Training(
        seconds=seconds,
        bubble=1 - _over(_mean(line.at(count) for line in busy), update) if update else 0.0,
        exposed=communication(lambda times: times.exposed),
        hidden=communication(lambda times: times.hidden),
        operations=updates * _mean(operations[rank].at(count) for rank in ranks),
    )


def _rank_of_stages(traces: Sequence[Trace], layers: Sequence[int]) -> list[int]:
    """A traced rank of each stage, or of the most similar one: at an end of the pipeline or not, and in layers."""
    own = {trace.stage: trace.rank for trace in reversed(traces)}
    ends = (0, len(layers) - 1)

    def differences(stage: int, other: int) -> tuple[bool, int, int]:
        return (stage in ends) != (other in ends), abs(layers[stage] - layers[other]), abs(stage - other)

    return [own[min(own, key=lambda other: differences(stage, other))] for stage in range(len(layers))]


def _pipeline(stages: Sequence[_Line], count: int, chunks: int) -> float:
    """Seconds of `count` micro-batches: the first one fills and drains all stages by their first chunks, the others
    follow at the pace of the slowest stage. It is exact for equal stages and messages that take no time, forward only
    or 1F1B (Narayanan et al. 2021, arXiv:2104.04473)."""
    each = [stage.each for stage in stages]
    return max(stage.fixed for stage in stages) + count * max(each) + (sum(each) - max(each)) / chunks


def _busy(times: Times) -> float:
    return times.total - times.waiting


def _longest(times: Mapping[int, Times]) -> float:
    return max(time.total for time in times.values())


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
