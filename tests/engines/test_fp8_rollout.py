"""vLLM's FP8: its name there, and that it is refused where there is no GPU. It has not run on one here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ranks import VOCAB, run, run_config

from megatron_aspo.config import ModelConfig, RolloutConfig, RunConfig
from megatron_aspo.distributed import distributed
from megatron_aspo.errors import UserError
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.rollout.engine import build_engine
from megatron_aspo.tokenizer import load_tokenizer

pytestmark = pytest.mark.engines


def refused(config: RunConfig) -> str:
    with distributed(config):
        policy = Policy(config, VOCAB)
        with pytest.raises(UserError) as error:
            build_engine(policy, config.rollout, load_tokenizer(config), config.seed)
        return str(error.value)


def test_a_cpu_refuses() -> None:
    config = run_config(model=ModelConfig(hidden_size=128, ffn_hidden_size=64, max_sequence_length=64))
    config = replace(config, rollout=RolloutConfig(engine="vllm", quantization="fp8"))
    (said,) = run(1, refused, config)
    assert said == "rollout.quantization=fp8 needs a GPU; set rollout.quantization=none"


def test_vllm_has_it_by_this_name() -> None:
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES

    assert "fp8_per_tensor" in ONLINE_QUANT_SHORTHAND_NAMES
