"""Ranks of an expert-parallel or context-parallel group rehearsed at the same time, with unequal routing of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rehearsals import DEMO, EXPERTS, MARKS, TINY

from megatron_aspo.config.load import load_config
from megatron_aspo.tools.planning.plan import make_plan
from megatron_aspo.tools.rehearsal import run

pytestmark = MARKS

RECOMPUTED = (*TINY, "model.ffn_hidden_size=256", "train.recompute=full")
SPREAD = ("parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.expert=2", *EXPERTS)
CONTEXT = ("parallel.tensor=1", "parallel.context=2")


def jobs(ranks: tuple[int, ...], world: int, *settings: str) -> list[run.Job]:
    plan = make_plan(load_config(DEMO, [*RECOMPUTED, *settings]), world)
    job = run.Job(plan.config, 0, world, plan.shape.vocab_size, 1, plan.gpu, save=False, routing="unequal")
    return [replace(job, rank=rank) for rank in ranks]


@pytest.mark.parametrize(("ranks", "world", "settings"), [((0, 2), 4, SPREAD), ((0, 1), 4, CONTEXT)])
def test_ranks_that_run_together(ranks: tuple[int, ...], world: int, settings: tuple[str, ...]) -> None:
    traces, troubles = run.rehearse_together(jobs(ranks, world, *settings))
    assert troubles == []
    splits = [[event.splits for event in trace.events if event.splits[1]] for trace in traces]
    assert (splits[0] != splits[1]) == ("parallel.expert=2" in settings)


def test_a_rank_with_another_program() -> None:
    """Rank 1 leaves the reference's log-probs out: named with its line, and no rank hangs."""
    first, second = jobs((0, 1), 4, "parallel.tensor=2")
    config = load_config(DEMO, [*RECOMPUTED, "parallel.tensor=2", "loss.kl_coef=0"])
    _, troubles = run.rehearse_together([first, replace(second, config=config)])
    assert "differ at call" in troubles[0]
    assert "rank 1: " in troubles[0]
    assert "megatron_aspo/" in troubles[0]
