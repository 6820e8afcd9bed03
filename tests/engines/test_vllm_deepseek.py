"""vLLM beside a model that was published in FP8 with a layer for MTP: it samples with the policy's weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run
from test_vllm import mismatch, update, vllm_config
from tiny_models import VOCAB, write_published, write_tokenizer

from megatron_aspo.config import ModelConfig
from megatron_aspo.distributed import distributed
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.rollout.engine import build_engine
from megatron_aspo.rollout.vllm import VllmEngine
from megatron_aspo.tokenizer import HuggingFaceTokenizer
from megatron_aspo.types import Prompt

pytestmark = pytest.mark.engines

# What vLLM's latent attention on a CPU has a kernel for: latents of 512 and rotary parts of 64.
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}


def sample_update_refit(folder: Path) -> dict[str, Any]:
    # Its attention with AMX throws away a weight that a refit would renew; the reference kernel keeps it.
    torch.cpu._is_amx_tile_supported = lambda: False
    config = vllm_config(ModelConfig(hf_path=str(folder), max_sequence_length=64))
    rng = np.random.default_rng(3)
    prompts = [Prompt(i, "", tuple(rng.integers(128, size=3 + i).tolist()), {}) for i in range(8)]
    with distributed(config):
        policy = Policy(config, VOCAB)
        engine = build_engine(policy, config.rollout, HuggingFaceTokenizer(str(folder)), seed=1)
        assert isinstance(engine, VllmEngine)
        engine.refit()
        samples = engine.generate(prompts, 4, 1.0)
        found = {"fresh": mismatch(policy, samples)}
        update(policy, samples, 3)
        found["stale"] = mismatch(policy, samples)
        engine.refit()
        found["refitted"] = mismatch(policy, engine.generate(prompts, 4, 1.0))
        model = engine._llm.llm_engine.model_config
        return found | {"quantization": model.quantization, "mtp": model.hf_config.num_nextn_predict_layers}


def test_logprobs_are_the_trainers_before_and_after_updates(tmp_path: Path) -> None:
    folder = write_published(tmp_path / "fp8", tmp_path / "meant", **LATENT)
    write_tokenizer(folder)
    (found,) = run(1, sample_update_refit, folder)
    assert found["fresh"]["logprob_diff_max"] < 1e-4
    assert found["stale"]["logprob_diff_max"] > 0.1
    assert found["refitted"]["logprob_diff_max"] < 1e-4
    assert (found["quantization"], found["mtp"]) == (None, 0)
