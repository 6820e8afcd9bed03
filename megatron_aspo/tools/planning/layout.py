"""Ranks and micro-batches of a planned run. Imports no torch."""

from __future__ import annotations

from megatron_aspo.config.run import RunConfig


def training_ranks(config: RunConfig, world: int) -> int:
    """Ranks that train, without those that only generate."""
    return world - config.rollout.ranks


def data_parallel_size(config: RunConfig, world: int) -> int:
    parallel = config.parallel
    return training_ranks(config, world) // (parallel.tensor * parallel.pipeline * parallel.context)


def micro_batches(config: RunConfig, world: int) -> int:
    """Micro-batches of a rank per update if every sample has the largest length."""
    samples = config.train.mini_batch_prompts * config.rollout.responses_per_prompt
    rounds = config.parallel.rounds
    shares = data_parallel_size(config, world) * rounds
    if not config.train.packing:
        return rounds * max(1, -(-samples // shares))
    tokens = samples * config.model.max_sequence_length
    return rounds * max(1, -(-tokens // (config.train.max_tokens_per_micro_batch * shares)))
