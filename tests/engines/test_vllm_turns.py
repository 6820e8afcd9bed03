"""Responses of several turns by vLLM: beside the policy, with the sampler's routes, and in ranks of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import everywhere, run, without_times
from test_remote import config_with
from test_vllm import build, make_prompts, mismatch, vllm_config
from tiny_models import VOCAB, write_model

from megatron_aspo.batch import Prompt
from megatron_aspo.commands import train as train_command
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import EvalConfig, TrainConfig
from megatron_aspo.journal.log import read_samples
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.megatron import EmbeddedEngine
from megatron_aspo.rollout.turns import play_turns

pytestmark = pytest.mark.engines

TURNS: dict[str, Any] = {
    "environment": "test_vllm_turns:Reply",
    "max_turns": 3,
    "stop": tuple("abcdefghijklmnopqrstuvwxyz"),
}


class Reply:
    """Says how long the turn was, with a stop string; scores the number of turns."""

    def reset(self, prompt: Prompt) -> None:
        self.score = 0.0
        assert prompt.entry is not None

    def step(self, response: str) -> str | None:
        self.score += 0.25
        return f" it had {len(response)}. "


def sample_beside_the_policy(config: RunConfig) -> dict[str, Any]:
    with distributed(config):
        policy, engine = build(config)
        play_turns(engine, config)
        engine.refit()
        samples = engine.generate(make_prompts(), 4, 1.0)
        greedy = engine.generate(make_prompts(), 1, 0.0)
        embedded = play_turns(EmbeddedEngine(policy, config.rollout, engine.tokenizer, 1), config)
        own = embedded.generate(make_prompts(), 1, 0.0)
        return {
            "mismatch": mismatch(policy, samples),
            "turns": [sample.turns for sample in samples],
            "ends": [(sample.turns, sample.finish_reason, sample.environment_score) for sample in samples],
            "greedy": [sample.token_ids.tolist() for sample in everywhere(greedy)],
            "embedded": [sample.token_ids.tolist() for sample in everywhere(own)],
        }


def test_beside_the_policy() -> None:
    config = vllm_config(parallel=ParallelConfig(tensor=2), tensor=2, max_response_tokens=44, **TURNS)
    for found in run(2, sample_beside_the_policy, config):
        assert found["mismatch"]["logprob_diff_max"] < 1e-4
        assert {2, 3} <= set(found["turns"]) <= {1, 2, 3}
        for turns, reason, score in found["ends"]:  # a turn that is cut is not answered
            assert score == turns / 4 or (reason == "length" and score == (turns - 1) / 4)
        assert (3, "stop", 0.75) in found["ends"]
        same = [a == b for a, b in zip(found["greedy"], found["embedded"], strict=True)]
        assert sum(same) >= 30  # of 32; rounding may decide between equal tokens


def sample_with_routes(config: RunConfig) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    sizes = rng.integers(3, 30, size=24)
    prompts = [Prompt(i, "", tuple(rng.integers(VOCAB, size=size).tolist()), {}) for i, size in enumerate(sizes)]
    with distributed(config):
        policy, engine = build(config, VOCAB)
        play_turns(engine, config)
        engine.refit()
        samples = engine.generate(prompts, 2, 1.0)
        return {
            "turns": [sample.turns for sample in samples],
            "sampler": mismatch(policy, samples),
            "trainer": mismatch(policy, [replace(sample, routes=None) for sample in samples]),
        }


def test_routes_of_observations_are_replayed_too(tmp_path: Path) -> None:
    write_model(
        *("qwen3-moe", tmp_path / "model"),
        **{"num_hidden_layers": 4, "hidden_size": 64, "head_dim": 32, "num_experts": 32, "num_experts_per_tok": 4},
        max_position_embeddings=256,
    )
    model = ModelConfig(hf_path=str(tmp_path / "model"), dtype="bfloat16", max_sequence_length=128)
    config = vllm_config(model, ParallelConfig(context=2), max_response_tokens=60, **TURNS)
    config = replace(config, train=TrainConfig(router_replay="sampler", max_tokens_per_micro_batch=512))
    for found in run(2, sample_with_routes, config):
        assert max(found["turns"]) == 3
        assert found["sampler"]["logprob_diff"] < 0.025
        assert found["trainer"]["logprob_diff"] > 0.035


def train_whole(config: RunConfig) -> None:
    train_command.run(config)


def test_in_ranks_of_their_own(tmp_path: Path) -> None:
    """The run with separate ranks is the run beside the policy, with responses that go on in the next step."""

    def config(name: str, ranks: int) -> RunConfig:
        settings = TURNS | {"ranks": ranks, "oversample": 1.5, "max_age": 2, "max_response_tokens": 24}
        base = config_with(**settings)
        return replace(
            base,
            name=name,
            output_dir=str(tmp_path),
            model=replace(base.model, max_sequence_length=44),
            train=replace(base.train, steps=3, log_samples=99, log_samples_every=1),
            eval=EvalConfig(every=2, responses_per_prompt=1),
        )

    run(1, train_whole, config("beside", 0))
    run(2, train_whole, config("apart", 1))

    def numbers(name: str) -> list[dict[str, Any]]:
        others = ("rollout/staleness", "rollout/staleness_updates")
        return [{k: v for k, v in record.items() if k not in others} for record in without_times(tmp_path / name)]

    assert numbers("apart") == numbers("beside")
    assert list(read_samples(tmp_path / "apart")) == list(read_samples(tmp_path / "beside"))
    steps = [record for record in numbers("apart") if record["phase"] == "train"]
    assert all(1 < record["rollout/turns"] <= 3 for record in steps)
    assert [record["eval/turns"] > 1 for record in numbers("apart") if record["phase"] == "eval"] == [True] * 3
