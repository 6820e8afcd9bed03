"""Samples and weights that a rank receives and sends, computed from the code that moves them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_aspo.config.checks import stage_layers
from megatron_aspo.config.run import RunConfig
from megatron_aspo.tools.planning.architectures import Shape
from megatron_aspo.tools.planning.engine import engine_parameters, layer_parameters
from megatron_aspo.tools.planning.layout import data_parallel_size, training_ranks


@dataclass(frozen=True)
class Traffic:
    """Bytes and connections of the fullest rank of its kind; samples have the largest length.

    Attributes:
        samples: received by a training rank in a step, tables and routes included.
        senders: ranks that it receives them from.
        sent: weights that a training rank sends at a refit, in buckets; 0 without ranks that only sample.
        staged_once: weights that a rollout rank receives over its lanes at a refit, and keeps in host memory until they
            are loaded.
        staged: host memory for all versions that may wait.
        loaded: weights that every rank of the engine receives from others at a refit.
        lanes: process groups of a training rank to rollout ranks.
        rollout_lanes: of a rollout rank to training ranks.
    """

    samples: int
    senders: int
    sent: int = 0
    staged_once: int = 0
    staged: int = 0
    loaded: int = 0
    lanes: int = 0
    rollout_lanes: int = 0


def traffic(config: RunConfig, shape: Shape, world: int) -> Traffic:
    """Traffic of a run on `world` GPUs."""
    from megatron_aspo.ranks.lanes import peers_of
    from megatron_aspo.rollout.table import received_bytes  # imports torch

    rollout, parallel, trained = config.rollout, config.parallel, training_ranks(config, world)
    response, longest = rollout.max_response_tokens, config.model.max_sequence_length
    sizes = stage_layers(shape.num_layers, parallel)
    routes = {"layers": shape.num_layers, "stage_layers": max(sizes), "top_k": shape.top_k}
    samples = received_bytes(config, trained, longest - response, response, **routes)
    count = rollout.prompts_per_step * rollout.responses_per_prompt
    senders = min(math.ceil(count / data_parallel_size(config, world)), trained - 1)
    model = engine_parameters(shape, 1) * 2
    if not rollout.ranks:
        return Traffic(samples, senders, loaded=model)
    largest = shape.vocab_size * shape.hidden_size * 2
    shares = trained // parallel.pipeline  # ranks that divide a stage's tensors
    # Tensors and experts of a stage are divided among its ranks apart; the owner of the embedding has no other tensor.
    sent = 0
    for i, size in enumerate(sizes):
        first = sum(sizes[:i])
        parts = [layer_parameters(shape, layer, 1) for layer in range(first, first + size)]
        dense, experts = (2 * sum(part) // shares for part in zip(*parts, strict=True))
        at_an_end = i in (0, len(sizes) - 1)
        sent = max(sent, experts + (max(largest, dense) if at_an_end else dense))
    lanes, others = len(peers_of(0, rollout.ranks, trained)), len(peers_of(0, trained, rollout.ranks))
    once = sent * lanes if trained >= rollout.ranks else max(largest, sent // others)
    return Traffic(
        samples=samples,
        senders=senders,
        sent=sent,
        staged_once=once,
        staged=(rollout.max_staleness + 1) * once,
        loaded=model,
        lanes=2 * others,  # over gloo and over NCCL
        rollout_lanes=2 * lanes,
    )
