"""Unfinished groups on their way between the roles and into checkpoints: only the ranks that need them keep them."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from ranks import run, run_config, tiny_run

from megatron_aspo.batch import Prompt
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data import PromptStream
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.journal.clock import Clock
from megatron_aspo.policy.saved_batches import load_groups, save_groups
from megatron_aspo.ranks.channel import Channel
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.ranks.stop_signals import StopSignals
from megatron_aspo.rollout import remote
from megatron_aspo.rollout.batches import Batches
from megatron_aspo.rollout.engine import NOTHING
from megatron_aspo.rollout.partial import Group, Pool, steps_behind
from megatron_aspo.rollout.remote import RemoteEngine, serve
from tests.unit.test_partial import LongTail, Prompts

pytestmark = pytest.mark.distributed

CONFIG = tiny_run(
    Path("unused"),
    rollout=RolloutConfig(
        engine="vllm", ranks=1, prompts_per_step=4, responses_per_prompt=3, oversample=1.5, dynamic_sampling=False
    ),
)


def serve_with(engine: Any, channel: Any, config: RunConfig = CONFIG, stop: StopSignals | None = None) -> None:
    """Serve with an engine in vLLM's place, and a reward for long responses."""
    setattr(remote, "VllmEngine", lambda *_, **__: engine)  # noqa: B010
    setattr(remote, "check_engine", lambda *_: None)  # noqa: B010
    serve(config, channel, lambda response, row: float(len(response) > 9), stop=stop)


def prompts_of(config: RunConfig) -> PromptStream:
    return PromptStream(config.data, AsciiTokenizer(), config.max_prompt_tokens)


def content(state: dict[str, Any]) -> list[Any]:
    return [(g.prompt.id, [response.versions.tolist() for response in g.responses]) for g in state["groups"]]


def batches_of(config: RunConfig, channel: Channel) -> Batches:
    """The batches of a training rank whose policy does not change."""
    policy: Any = SimpleNamespace(weight_version=0)
    nothing: Any = None
    engine = RemoteEngine(policy, config.rollout, channel, AsciiTokenizer())
    return Batches(policy, engine, prompts_of(config), nothing, config.rollout, 0, 1)


def save_after_a_batch(folder: Path) -> list[Any] | None:
    """The unfinished groups that a training rank gets for a checkpoint."""
    with distributed(CONFIG) as channel:
        assert channel is not None
        if channel.role == "rollout":
            serve_with(LongTail(), channel)
            return None
        batches = batches_of(CONFIG, channel)
        batches.next(Clock())
        groups = batches.in_progress()
        assert groups is not None  # on any rank: the checkpoint's collective depends on it
        if dist.get_rank() == 0:
            save_groups(folder, groups)
        return content(groups) if groups else []


def test_only_the_first_training_rank_gets_the_unfinished_groups(tmp_path: Path) -> None:
    by_rank = run(3, save_after_a_batch, tmp_path)
    local = Pool(LongTail(), CONFIG.rollout)
    local.sample(prompts_of(CONFIG), 4, 0)
    expected = content(local.state_dict())
    assert len(expected) == 2
    assert sum(len(versions) for _, responses in expected for versions in responses) > 3
    assert by_rank == [expected, [], None]
    saved = load_groups(tmp_path)
    assert saved is not None
    assert content(saved) == expected


def test_a_rollout_rank_does_not_keep_the_groups_of_other_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VllmEngine", "check_engine"):
        monkeypatch.setattr(remote, name, getattr(remote, name))  # puts the real ones back
    begun = [replace(NOTHING, token_ids=np.zeros(5, np.int32)) for _ in range(2)]
    alive = [weakref.ref(response) for response in begun]
    kept: list[bool] = []
    engine: Any = LongTail()
    engine.writers = [[0], [1]]

    def messages() -> Iterator[Any]:
        groups = [Group(Prompt(i, "", (1,), {}), i, 0, [begun.pop(0)]) for i in range(2)]
        settings = {"responses_per_prompt": 3, "max_response_tokens": CONFIG.rollout.max_response_tokens}
        state = {"batch": 1, "replicas": 2, "groups": groups, **settings}
        del groups
        yield "set_groups", state
        del state
        yield ("nothing",)
        kept.extend(response() is not None for response in alive)
        yield None

    received = messages()
    serve_with(engine, SimpleNamespace(receive=lambda: next(received), send=lambda message: None))
    assert kept == [True, False]


def resume_with_fewer_prompts(before: RolloutConfig, after: RolloutConfig) -> dict[str, Any]:
    """A pool of replicas of one rank each, of which another one with smaller batches takes over the groups."""
    with distributed(run_config()):
        replicas = dist.get_world_size()
        engine, prompts, ages = LongTail(), Prompts(), list[int]()
        pool: Any = None
        state: dict[str, Any] = {}
        vars(engine).update(writers=[[i] for i in range(replicas)], replica=dist.get_rank())
        for settings, batches in ((before, 4), (after, 30)):
            pool = Pool(engine, settings)
            if state:
                pool.load_state_dict(state)
            start = engine.written
            for _ in range(batches):
                samples = pool.sample(prompts, settings.prompts_per_step, 0)
                ages += [engine.version - sample.weight_version for sample in samples if state]
                pool.batch += 1
                engine.version += 1
            carrier = [pool.state_dict()]
            dist.broadcast_object_list(carrier)
            state = state or carrier[0]
        return {
            "oldest": max(ages),
            "limit": steps_behind(after, state, replicas),
            "left": len(state["groups"]),
            "written": engine.written - start,
            "counted": pool.written,
        }


def test_no_response_is_older_than_the_bound_after_a_resume_with_fewer_prompts() -> None:
    """Two of three replicas take two groups of each batch, the last one takes one."""
    before = RolloutConfig(prompts_per_step=24, responses_per_prompt=2, oversample=3.0, max_age=1)
    after = replace(before, prompts_per_step=5, oversample=1.5)
    by_rank = run(3, resume_with_fewer_prompts, before, after)
    for result in by_rank:
        assert (result["left"], result["limit"]) == (48, 18)
        assert steps_behind(after) == 2
        assert 12 < result["oldest"] <= 18
        assert result["counted"] == sum(result["written"] for result in by_rank)


def signal_a_rollout_rank(config: RunConfig) -> list[bool] | None:
    """The last of three rollout ranks gets a signal; return whether a training rank knows, before and after a batch."""
    with distributed(config) as channel, StopSignals() as stop:
        assert channel is not None
        if channel.role == "rollout":
            if (rank := dist.get_rank()) == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            engine = LongTail()
            vars(engine).update(writers=[[i] for i in range(3)], replica=rank)
            serve_with(engine, channel, config, stop)
            return None
        batches = batches_of(config, channel)
        before = stop.requested()
        batches.next(Clock())
        return [before, stop.requested()]


def test_a_signal_to_a_rollout_rank_stops_the_run() -> None:
    config = replace(CONFIG, rollout=replace(CONFIG.rollout, ranks=3))
    assert run(5, signal_a_rollout_rank, config) == [[False, True], [False, True], None, None, None]
