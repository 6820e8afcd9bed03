"""The plan's numbers against small runs on a CPU: the embedded engine's cache matches exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from ranks import VOCAB, run, run_config

from megatron_aspo.batch import Prompt
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout import megatron as engine_module
from megatron_aspo.tools.planning.architectures import shape_of
from megatron_aspo.tools.planning.engine import beside

pytestmark = pytest.mark.distributed

MODEL = ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=160, num_attention_heads=4, max_sequence_length=64)


def cache_bytes(config: RunConfig) -> tuple[int, int]:
    """(pipeline stage, bytes of the keys and values for a full batch of the embedded engine)."""
    contexts: list[Any] = []

    class Kept(engine_module.KeyValueCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            contexts.append(self)

    engine_module.KeyValueCache = Kept  # only in this test's process
    with distributed(config):
        policy = Policy(config, VOCAB)
        engine = engine_module.EmbeddedEngine(policy, config.rollout, AsciiTokenizer(), 0)
        prompt = tuple(range(config.model.max_sequence_length - config.rollout.max_response_tokens))
        engine.generate([Prompt(0, "", prompt, {})], config.rollout.batch_size, 1.0)
        (context,) = contexts
        pairs = context.key_value_memory_dict.values()
        return policy.pp_group.rank(), sum(tensor.untyped_storage().nbytes() for pair in pairs for tensor in pair)


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(pipeline=2, first_stage_layers=1)]
)
def test_the_embedded_engines_cache(parallel: ParallelConfig) -> None:
    ranks = parallel.model_parallel_size
    config = run_config(parallel, model=MODEL)
    config = replace(config, rollout=replace(config.rollout, batch_size=6))
    for stage, measured in run(ranks, cache_bytes, config):
        assert beside(config, shape_of(config.model, VOCAB), "awake", stage)["KV cache"] == measured
