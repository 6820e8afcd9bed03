"""Memory of a rehearsed rank in each phase: the policy's tensors as traced, and the engine's as computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from megatron_aspo.tools.planning.engine import State, beside, generator_memory, host_beside
from megatron_aspo.tools.planning.layout import training_ranks
from megatron_aspo.tools.planning.plan import Plan
from megatron_aspo.tools.rehearsal.events import Trace


@dataclass(frozen=True)
class Need:
    """Bytes of one rank in one phase.

    Attributes:
        role: the rank and its stage.
        rank: of the training ranks; -1 of those that only sample.
        policy: peak of the policy's tensors on the device.
        engine: what is beside them, by component.
        host: peak of tensors in host memory.
    """

    role: str
    phase: str
    state: State
    policy: int
    engine: dict[str, int]
    host: int
    rank: int = -1

    @property
    def device(self) -> int:
        return self.policy + sum(self.engine.values())


def needs(trace: Trace, plan: Plan) -> list[Need]:
    """Memory of a traced rank in the order of its phases."""
    role, asleep_host = f"rank {trace.rank}, stage {trace.stage}", host_beside(plan.config, plan.shape)
    found: list[Need] = []
    for phase, memory in trace.phases.items():
        # Without vLLM the policy samples in its place.
        state = cast(State, trace.engine.get(phase) or ("awake" if phase == "rollout" else "absent"))
        host = trace.host[phase].peak if phase in trace.host else 0
        engine = beside(plan.config, plan.shape, state, trace.stage)
        host += asleep_host * (state == "asleep")
        found.append(Need(role, phase, state, memory.peak, engine, host, trace.rank))
    return found


def generator_needs(plan: Plan) -> list[Need]:
    """Memory of a rank that only samples, if there are any."""
    phases = generator_memory(plan.config, plan.shape)
    return [
        Need("ranks that only sample", phase, "refit" if phase == "refit" else "awake", 0, parts, 0)
        for phase, parts in phases.items()
    ]


def all_needs(traces: Sequence[Trace], plan: Plan) -> list[Need]:
    """Memory of all traced ranks and of those that only sample."""
    return [need for trace in traces for need in needs(trace, plan)] + generator_needs(plan)


def node_host(traces: Sequence[Trace], plan: Plan) -> tuple[str, int]:
    """(phase, bytes) of host memory on the fullest node, all of whose ranks are of one stage; 0 if nothing was traced.

    The first of the ranks with the same parameters saves and loads for all of them. The others hold meanwhile what they
    held before, and no copy beside the next update.
    """
    config, parallel = plan.config, plan.config.parallel
    ranks = config.cluster.gpus_per_node if config.cluster else 8
    replicas = training_ranks(config, plan.world) // (parallel.pipeline * parallel.tensor)
    writers = min(ranks, max(parallel.tensor, ranks // replicas))
    sizes: dict[str, int] = {}
    for trace in traces:
        for phase, memory in trace.host.items():
            busy = writers if phase in ("checkpoint save", "update beside the save", "checkpoint load") else ranks
            others = trace.host["update"].peak if phase == "update beside the save" else memory.start
            asleep = host_beside(config, plan.shape) * (trace.engine.get(phase) == "asleep")
            size = busy * memory.peak + (ranks - busy) * others + ranks * asleep
            sizes[phase] = max(size, sizes.get(phase, 0))
    return max(sizes.items(), key=lambda item: item[1], default=("", 0))
