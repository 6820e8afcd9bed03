"""A run on given GPUs, checked without starting anything, and settings that lower its memory. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_aspo.config.fp8 import check_fp8_device
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.tools.planning.architectures import Shape, shape_of
from megatron_aspo.tools.planning.checks import check_plan, plan_notes
from megatron_aspo.tools.planning.gpus import KNOWN, Gpu


@dataclass(frozen=True)
class Plan:
    """A run on `world` equal GPUs.

    Attributes:
        notes: warnings.
    """

    config: RunConfig
    shape: Shape
    gpu: Gpu
    world: int
    notes: list[str]


def make_plan(config: RunConfig, world: int | None = None, gpu: str | None = None, vocab_size: int = 128) -> Plan:
    """Plan a run on `world` GPUs; by default those of `config.cluster`, or the fewest that hold the layout.

    Args:
        vocab_size: the tokenizer's, for a model without files.

    Raises:
        UserError: the model's shape is unknown or does not fit the layout.
    """
    cluster = config.cluster
    if world is None:
        separate = config.rollout.ranks
        least = config.parallel.model_parallel_size
        world = cluster.gpus if cluster else separate + (least if separate else math.lcm(least, config.rollout.tensor))
    if world < 1:
        raise UserError(f"--gpus={world} must be >= 1")
    kind = KNOWN[gpu or (cluster.gpu if cluster else "h100")]
    shape = shape_of(config.model, vocab_size)
    check_plan(config, shape, world)
    check_fp8_device(config.fp8, kind.capability, cuda=(13, 0))
    return Plan(config, shape, kind, world, plan_notes(config, shape, world))


_Unused = Callable[[RunConfig], bool]

_SETTINGS: tuple[tuple[str, str, _Unused], ...] = (
    ("train.release_gradients=true", "awake refit asleep", lambda config: not config.train.release_gradients),
    ("rollout.sleep_level=2", "refit asleep update", lambda config: _vllm(config) and config.rollout.sleep_level < 2),
    ("a lower rollout.kv_cache_gb", "awake", lambda config: _vllm(config)),
    ("a lower rollout.batch_size", "awake", lambda config: not _vllm(config)),
    (
        "a lower train.max_tokens_per_micro_batch",
        "log-probs update",
        lambda config: config.train.max_tokens_per_micro_batch >= 2 * config.model.max_sequence_length,
    ),
    ("train.recompute=full", "update", lambda config: config.train.recompute != "full"),
    ("a higher rollout.tensor", "awake refit", lambda config: _vllm(config)),
    ("optimizer.cpu_offload=1", "awake refit asleep update", lambda config: config.optimizer.cpu_offload < 1),
    ("a higher parallel.tensor or pipeline", "awake refit asleep log-probs update", lambda config: True),
)
"""Setting, the phases and states of the engine in which it lowers the memory, and whether it is unused; cheapest first:
free ones, then those that cost time, then communication."""


def remedies(config: RunConfig, phase: str, state: str) -> list[str]:
    """Settings that lower the memory of a phase, in which the engine is in `state`; not tried."""
    kind = next((word for word in ("log-probs", "update") if word in phase), state)
    return [setting for setting, where, unused in _SETTINGS if kind in where.split() and unused(config)]


def _vllm(config: RunConfig) -> bool:
    return config.rollout.engine == "vllm"
