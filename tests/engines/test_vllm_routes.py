"""vLLM's routes in training (`train.router_replay=sampler`): sampler and trainer differ less with them, in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run
from test_vllm import build, mismatch, vllm_config
from tiny_models import VOCAB, write_model

from megatron_aspo.batch import Prompt
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.stops import Stops

pytestmark = pytest.mark.engines


def sample_and_compare(config: RunConfig) -> dict[str, Any]:
    """Mismatch of the same samples with the trainer's routes, with the sampler's, and with those of the token before;
    samples that vLLM has ended at a stop string."""
    rng = np.random.default_rng(3)
    prompts = [
        Prompt(i, "", tuple(rng.integers(VOCAB, size=size).tolist()), {})
        for i, size in enumerate(rng.integers(3, 30, size=24))
    ]
    with distributed(config):
        policy, engine = build(config, VOCAB)
        engine.refit()
        samples = engine.generate(prompts, 2, 1.0)
        found: dict[str, Any] = {"sampler": mismatch(policy, samples)}
        shifted = [replace(s, routes=None if s.routes is None else np.roll(s.routes, 1, 0)) for s in samples]
        found["shifted"] = mismatch(policy, shifted)
        found["trainer"] = mismatch(policy, [replace(sample, routes=None) for sample in samples])
        engine._stops = Stops(engine.tokenizer, ("a", "b", "c", "d", "e", "f"))
        ended = engine.generate(prompts[:8], 2, 1.0)
        found["ended"] = [sample.finish_reason for sample in ended], mismatch(policy, ended)
        return found


def test_the_samplers_routes_bring_sampler_and_trainer_together(tmp_path: Path) -> None:
    write_model(
        *("qwen3-moe", tmp_path / "model"),
        **{"num_hidden_layers": 4, "hidden_size": 64, "head_dim": 32, "num_experts": 32, "num_experts_per_tok": 4},
        max_position_embeddings=256,
    )
    model = ModelConfig(hf_path=str(tmp_path / "model"), dtype="bfloat16", max_sequence_length=128)
    parallel = ParallelConfig(tensor=2, sequence_parallel=True)
    config = vllm_config(model, parallel, max_response_tokens=32)
    config = replace(config, train=TrainConfig(router_replay="sampler", max_tokens_per_micro_batch=512))
    for found in run(2, sample_and_compare, config):
        sampler, trainer, shifted = (found[name] for name in ("sampler", "trainer", "shifted"))
        assert sampler["logprob_diff"] < 0.025
        assert sampler["logprob_diff_max"] < 0.2
        assert trainer["logprob_diff"] > 0.035
        assert trainer["kl"] > 5 * sampler["kl"]
        assert shifted["logprob_diff"] > 0.4
        reasons, numbers = found["ended"]
        assert set(reasons) == {"stop", "length"}
        assert numbers["logprob_diff"] < 0.025
