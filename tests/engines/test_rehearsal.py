"""`megatron-aspo plan`: a whole step of Policy on simulated GPUs, with Transformer Engine's own Python.

The ranks of one case run beside each other, each in a process of its own, as the command starts them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rehearsals import DEMO, EXPERTS, MARKS, ROOT, TINY

from megatron_aspo.config.load import load_config
from megatron_aspo.tools.planning.architectures import PUBLIC
from megatron_aspo.tools.planning.engine import layer_parameters
from megatron_aspo.tools.planning.layout import micro_batches, training_ranks
from megatron_aspo.tools.planning.plan import Plan, make_plan
from megatron_aspo.tools.rehearsal import run
from megatron_aspo.tools.rehearsal.agreement import find_troubles
from megatron_aspo.tools.rehearsal.events import Trace
from megatron_aspo.tools.rehearsal.findings import find
from megatron_aspo.tools.rehearsal.step import step_times

pytestmark = MARKS

WIDE = [
    "model.hidden_size=4096",
    "model.ffn_hidden_size=16384",
    "model.max_sequence_length=2048",
    "train.max_tokens_per_micro_batch=16384",
]
"""Layers that take much longer than the loss, so that pipeline stages are equal; no GPU is there to mind."""


@dataclass(frozen=True)
class Family:
    """A recipe with fewer layers and pipeline stages, at its true widths and world size.

    Attributes:
        ranks: rehearsed, the first of a stage each.
        settings: besides the recipe's.
    """

    recipe: str
    layers: int
    ranks: tuple[int, ...]
    settings: tuple[str, ...] = ()


FAMILIES = {
    "CP2": Family("archer2_math", 2, (0,)),
    "dense": Family("qwen2_5_32b", 2, (0,)),
    "FP8": Family("qwen2_5_32b", 2, (0,), ("fp8.recipe=blockwise",)),
    "PP4": Family(
        "qwen3_32b_async", 4, (0, 8, 16, 24), ("parallel.first_stage_layers=null", "parallel.last_stage_layers=null")
    ),
    "experts": Family("qwen3_30b_a3b", 2, (0,)),
    "MLA": Family("deepseek_v3_671b", 5, (0, 128), ("parallel.pipeline=2",)),
    "delta nets": Family("qwen3_next_80b_a3b", 4, (0,), ("parallel.pipeline=1",)),
}


def family_plan(family: Family, folder: Path) -> Plan:
    config = load_config(str(ROOT / f"examples/{family.recipe}.yaml"), family.settings)
    fields = PUBLIC[config.model.hf_path] | {"num_hidden_layers": family.layers}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return make_plan(replace(config, model=replace(config.model, hf_path=str(folder))))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Plan, list[Trace]]]:
    """Plan and traces of every family, in two processes."""
    plans = {name: family_plan(each, tmp_path_factory.mktemp("models") / "m") for name, each in FAMILIES.items()}
    jobs = [
        run.Job(
            plans[name].config,
            rank,
            training_ranks(plans[name].config, plans[name].world),
            plans[name].shape.vocab_size,
            len(each.ranks) + 1,
            plans[name].gpu,
        )
        for name, each in FAMILIES.items()
        for rank in each.ranks
    ]
    traces = iter(run.rehearse_jobs(jobs))
    return {name: (plans[name], [next(traces) for _ in each.ranks]) for name, each in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_passes_all_checks(name: str, families: dict[str, tuple[Plan, list[Trace]]]) -> None:
    plan, traces = families[name]
    assert find(traces, plan) == []
    for trace in traces:
        assert {"refit", "checkpoint save", "checkpoint load", "update after resume"} <= trace.phases.keys()
        assert trace.guessed.keys() <= {line for line in trace.guessed if "policy/trainer.py" in line}
        assert trace.phases["build to resume"].peak <= 1.02 * trace.phases["build"].peak  # nothing is kept
    assert step_times(traces, plan).mfu[1] < 1


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_of_a_family(name: str, families: dict[str, tuple[Plan, list[Trace]]]) -> None:
    """All stages together hold what one rank of a vLLM holds, but for experts, which are spread over other ranks."""
    plan, traces = families[name]
    shape, parallel = plan.shape, plan.config.parallel
    expected = shape.hidden_size + 2 * shape.vocab_size // parallel.tensor * shape.hidden_size
    for layer in range(shape.num_layers):
        experts = layer_parameters(shape, layer, parallel.expert_tensor_size)[1]
        expected += layer_parameters(shape, layer, parallel.tensor)[0] + experts // parallel.expert
    assert sum(trace.parameters for trace in traces) == expected


def test_an_earlier_stage_stands_for_later_ones(families: dict[str, tuple[Plan, list[Trace]]]) -> None:
    """The earlier one of two equal stages holds a micro-batch more: its layer's input, [10240, 5120] over 4
    ranks, and what the layer saves."""
    _, (_, second, third, _) = families["PP4"]
    for phase in ("old log-probs", "first update", "update", "refit", "checkpoint save", "update after resume"):
        assert second.phases[phase].peak >= third.phases[phase].peak
    more = second.phases["update"].peak - third.phases["update"].peak
    assert more > 2 * 10240 * 5120 // 4


CHUNKS = (
    "parallel.virtual_pipeline=2",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
    "rollout.engine=vllm",
)
FLEX = ("parallel.moe_dispatcher=flex", *EXPERTS)
"""Rehearsed as alltoall, with a note."""


def tiny_plan(*settings: str) -> Plan:
    """A plan for two replicas."""
    config = load_config(DEMO, [*TINY, "model.num_layers=4", *settings])
    return make_plan(config, 2 * config.parallel.model_parallel_size)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        pytest.param(
            (0, 1, 4, 5),
            ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence_parallel=true", *CHUNKS, *WIDE),
            id="TP2 PP2, two chunks",
        ),
        pytest.param((0, 1), ("parallel.tensor=1", "parallel.context=2", "train.recompute=full"), id="CP2"),
        pytest.param(
            (0, 1, 2, 3),
            ("parallel.tensor=1", "parallel.expert=2", "train.recompute=full", "train.router_replay=trainer", *FLEX),
            id="EP2",
        ),
        pytest.param((0,), ("parallel.tensor=2", "fp8.recipe=blockwise", "rollout.engine=vllm"), id="FP8"),
    ],
)
def test_ranks_of_a_small_run(ranks: tuple[int, ...], settings: tuple[str, ...]) -> None:
    plan = tiny_plan(*settings)
    assert any("flex is planned as alltoall" in note for note in plan.notes) == (FLEX[0] in settings)
    traces = run.rehearse(plan, ranks)
    assert find(traces, plan) == []
    for trace in traces:
        update = trace.phases["update"]
        assert update.start == update.end > 0
        assert trace.kernels["update"] > trace.kernels["old log-probs"] > 0
    if (stages := plan.config.parallel.pipeline) > 1:
        chunks = plan.config.parallel.virtual_pipeline
        bubble = (stages - 1) / (micro_batches(plan.config, plan.world) * chunks + stages - 1)
        # 0.11 of the schedule alone, 0.20 without chunks; more messages than these take a part.
        assert step_times(traces, plan).bubble == (pytest.approx(bubble, rel=0.2), pytest.approx(bubble, rel=0.2))
    # A fault on one rank is seen on all that it concerns.
    events = {trace.rank: list(trace.events) for trace in traces}
    first = next(i for i, event in enumerate(events[0]) if event.kind == "allreduce" and len(event.ranks) == plan.world)
    del events[0][first]
    assert len(ranks) == 1 or find_troubles(events)
