"""Findings in the traces of rehearsed ranks. Each is one line that names a cause; a run without any is as planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_aspo.tools.planning.gpus import GIB
from megatron_aspo.tools.planning.plan import Plan
from megatron_aspo.tools.rehearsal.agreement import find_troubles
from megatron_aspo.tools.rehearsal.events import Trace
from megatron_aspo.tools.rehearsal.memory import all_needs

_EACH = {
    "megatron/core/transformer/moe/token_dispatcher.py": "the sizes of an all-to-all between experts",
    "megatron/core/pipeline_parallel/p2p_communication.py": "Megatron's exchange between pipeline stages",
}
"""Beginning of a line of code -> the reason why the host waits for the device there with every micro-batch."""

_ONCE = {
    "megatron/core/distributed/distributed_data_parallel.py": "buffers of gradients freed or made",
    "megatron/core/optimizer/": "the norm of the gradient",
    "megatron_aspo/policy/trainer.py": "finiteness and norm of the gradient",
}
"""The same where it waits in each update."""

_STATES = (
    "megatron/core/distributed/",
    "megatron/core/optimizer/",
    "transformer_engine/pytorch/optimizers/",
    "transformer_engine/pytorch/tensor/",
    "transformer_engine/pytorch/module/base.py:140",
)
"""Beginning of the lines that make what a first update may keep: gradients, optimizer states, weights in FP8, an unused
gradient for each shape of a weight."""

_CACHES = (
    "megatron/core/models/common/embeddings/",
    "transformer_engine/pytorch/cpp_extensions/gemm.py",
    "transformer_engine/pytorch/tensor/",
)
"""Beginning of the lines that make what a first pass keeps: rotary angles, the products' workspace, weights in FP8."""

_RESULTS = ("megatron_aspo/policy/trainer.py", "megatron_aspo/loss/", "megatron_aspo/policy/router_replay.py")
"""Beginning of the lines that make what passes for log-probs return: these and the routing."""

_KEEPS: dict[str, tuple[str, ...]] = {
    "old log-probs": _RESULTS + _CACHES,
    "reference log-probs": _RESULTS,
    "first update": _STATES,  # a graph kept until the next update leaves as much memory before that one as after it
    "update": (),
    "refit": (),
    "checkpoint save": (),
}
"""Phase -> beginning of the lines whose tensors may stay on the device."""

_MIB = 1 << 20

_LEFT_OVER = 1 << 14
"""Bytes of counters and norms that may stay for each layer of the model."""

_STEP = ("old log-probs", "reference log-probs", "first update", "update")
_COMPARED = ("megatron_aspo/policy/trainer.py", "megatron_aspo/rollout/weight_sync.py")
"""Beginning of the lines that only compare values or write them to the log."""


def check(traces: Sequence[Trace], plan: Plan) -> dict[str, list[str]]:
    """Name of each check -> its findings, a line each."""
    shared = set[str].intersection(*(set(trace.phases) for trace in traces))  # not all ranks save and resume
    if len({trace.stage for trace in traces}) > 1:
        shared.discard("refit")  # stages exchange names and shapes as objects, of which a rank has only its own
    calls = {trace.rank: [event for event in trace.events if event.phase in shared] for trace in traces}
    troubles = [str(trouble) for trouble in find_troubles(calls)]
    agreement = {"collectives and messages fit together": troubles} if len(calls) > 1 else {}  # one rank fits itself
    return {
        "every phase fits": _fits(traces, plan),
        "no phase leaves memory behind": [
            line for trace in traces for line in _kept(trace, plan) + _released(trace, plan)
        ],
        "the host waits only where it must": [line for trace in traces for line in _waits(trace)],
        "no branch depends on an unknown value": [line for trace in traces for line in _guesses(trace)],
        "log-probs can be reproduced": [line for trace in traces for line in _unordered(trace)],
    } | agreement


def check_neighbours(traces: Sequence[Trace], troubles: list[str], plan: Plan) -> dict[str, list[str]]:
    """The same for rank 0 and its neighbour, whose tokens are routed unequally; nothing without a neighbour."""
    if not traces and not troubles:
        return {}
    return {"neighbours that exchange values fit together": troubles + _fits(traces, plan)}


def find(traces: Sequence[Trace], plan: Plan) -> list[str]:
    """All findings, a line each."""
    return [line for found in check(traces, plan).values() for line in found]


def _fits(traces: Sequence[Trace], plan: Plan) -> list[str]:
    found: list[str] = []
    memories = {(trace.rank, phase): memory for trace in traces for phase, memory in trace.phases.items()}
    for need in all_needs(traces, plan):
        if need.device <= plan.gpu.usable:
            continue
        parts = Counter({name: size for name, size in need.engine.items() if not name.startswith("runtime")})
        if memory := memories.get((need.rank, need.phase)):
            parts += Counter(memory.holders) - Counter(memory.before)
        largest = ", ".join(f"{size / GIB:.2f} from {name}" for name, size in parts.most_common(2))
        sizes = f"{need.device / GIB:.1f} GiB do not fit into {plan.gpu.usable / GIB:.1f} GiB"
        found.append(f"{need.role}, {need.phase}: {sizes}; the largest parts that come with the phase: {largest}")
    return found


def _kept(trace: Trace, plan: Plan) -> list[str]:
    found: list[str] = []
    counters = _LEFT_OVER * plan.shape.num_layers
    for phase, memory in trace.phases.items():
        if phase not in _KEEPS or memory.end <= memory.start:
            continue
        kept = Counter({line: size for line, size in memory.kept.items() if not line.startswith(_KEEPS[phase] or "-")})
        if kept.total() > counters * (phase != "update"):
            line, size = kept.most_common(1)[0]
            sizes = f"{kept.total() / _MIB:.1f} MiB stay on the device, {size / _MIB:.1f} of them from {line}"
            found.append(f"rank {trace.rank}, {phase}: {sizes}")
    return found


def _released(trace: Trace, plan: Plan) -> list[str]:
    memory = trace.phases.get("release gradients")
    if memory is None or memory.end < memory.start or not plan.config.train.release_gradients:
        return []
    return [f"rank {trace.rank}: releasing the gradients frees nothing"]


def _waits(trace: Trace) -> list[str]:
    return [
        f"rank {trace.rank}, {phase}: the host waits for the device {count} times at {line} ({what})"
        for (phase, what, line), count in trace.syncs.items()
        if phase in _STEP and not line.startswith(tuple(_EACH)) and not _is_once(trace, phase, what, line)
    ]


def _is_once(trace: Trace, phase: str, what: str, line: str) -> bool:
    """Whether it is a wait per update. The first update has fewer micro-batches than the second one."""
    counts = [trace.syncs.get((update, what, line), 0) for update in ("first update", "update")]
    return line.startswith(tuple(_ONCE)) and phase.endswith("update") and max(counts[0], 1) >= counts[1]


def _guesses(trace: Trace) -> list[str]:
    return [
        f"rank {trace.rank}: a branch depends on an unknown value at {line}"
        for line in trace.guessed
        if not line.startswith(_COMPARED)
    ]


def _unordered(trace: Trace) -> list[str]:
    return [
        f"rank {trace.rank}, {phase}: {name} sums in any order {count} times at {line}: other log-probs in every pass"
        for (phase, name, line), count in trace.unordered.items()
        if phase.endswith("log-probs")
    ]
