"""Tokens, operations and an estimate of the time of a step. Nothing here was measured; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_aspo.config import RunConfig
from megatron_aspo.planning.architectures import Shape
from megatron_aspo.planning.gpus import GIB, Gpu
from megatron_aspo.planning.memory import micro_batches, refit_bytes, training_ranks
from megatron_aspo.planning.parameters import active_parameters, engine_parameters, kv_bytes_per_token

TRAIN_UTILISATION = (0.25, 0.45)
"""Of a GPU's bfloat16 peak, without the pipeline's bubble: an assumption, as all ranges here are."""

DECODE_UTILISATION = (0.35, 0.7)
"""Of a GPU's memory bandwidth while decoding."""

DECODE_OVERHEAD = (0.006, 0.02)
"""Seconds a decoding step takes besides: kernels' starts, collectives, the scheduler."""

REFIT_BANDWIDTH = (5e9, 50e9)
"""Bytes a second at which whole tensors are put together on every rank."""

MEAN_RESPONSE = (0.3, 1.0)
"""Mean length of a response over its limit: the short and the long end of the range."""


@dataclass(frozen=True)
class Speed:
    """Of one step; pairs are (low, high) ends of an estimate.

    Attributes:
        tokens: in all samples of the rollout batch.
        flops: of the forward and backward passes of all updates and of the old log-probs.
        seconds: phase -> range.
        overlapped: responses are sampled by ranks of their own while the others train.
    """

    tokens: tuple[float, float]
    flops: tuple[float, float]
    seconds: dict[str, tuple[float, float]]
    overlapped: bool

    @property
    def step_seconds(self) -> tuple[float, float]:
        low, high = (self._step([ends[end] for ends in self.seconds.values()]) for end in (0, 1))
        return low, high

    def _step(self, seconds: list[float]) -> float:
        rollout, *others = seconds
        return max(rollout, sum(others)) if self.overlapped else sum(seconds)


def estimate_speed(config: RunConfig, shape: Shape, gpu: Gpu, world: int) -> Speed:
    ends = [_one_end(config, shape, gpu, world, i) for i in (0, 1)]
    (low_tokens, low_flops, low), (high_tokens, high_flops, high) = ends
    return Speed(
        tokens=(low_tokens, high_tokens),
        flops=(low_flops, high_flops),
        seconds={phase: (low[phase], high[phase]) for phase in low},
        overlapped=config.rollout.max_staleness > 0,
    )


def forward_flops(shape: Shape, tokens: float, mean_length: float) -> float:
    """Of one forward pass over `tokens`: two for each active weight, and causal attention's."""
    value = shape.latent.value_dim if shape.latent else shape.head_dim
    attention = shape.num_layers * shape.num_heads * (shape.head_dim + value) * mean_length  # 2 products, half masked
    return tokens * (2 * active_parameters(shape) + attention)


def _one_end(config: RunConfig, shape: Shape, gpu: Gpu, world: int, end: int) -> tuple[float, float, dict[str, float]]:
    rollout, train = config.rollout, config.train
    samples = rollout.prompts_per_step * rollout.responses_per_prompt
    response = rollout.max_response_tokens * MEAN_RESPONSE[end]
    prompt = (config.model.max_sequence_length - rollout.max_response_tokens) * MEAN_RESPONSE[end]
    mean = prompt + response
    tokens = samples * mean
    forward = forward_flops(shape, tokens, mean)
    passes = 4 if train.recompute == "full" else 3
    log_probs = forward * (2 if config.loss.kl_coef else 1)
    update = forward * passes * train.epochs
    best = 1 - end  # the short end has the better utilisation
    peak = gpu.flops * training_ranks(config, world) * TRAIN_UTILISATION[best]
    share = micro_batches(config, world, mean)
    bubble = 1 + (config.parallel.pipeline - 1) / share
    seconds = {
        "rollout": _rollout_seconds(config, shape, gpu, world, response, mean, end),
        "old log-probs": log_probs / peak * (1 + (config.parallel.pipeline - 1) / (share * _mini_batches(config))),
        "update": update / peak * bubble + _offload_seconds(config, shape, world),
        "refit": refit_bytes(config, shape) / REFIT_BANDWIDTH[best] if rollout.engine == "vllm" else 0.0,
    }
    return tokens, log_probs + update, seconds


def _mini_batches(config: RunConfig) -> int:
    return -(-config.rollout.prompts_per_step // config.train.mini_batch_prompts)


def _offload_seconds(config: RunConfig, shape: Shape, world: int) -> float:
    """Gradients to the host, weights back, 10 GB/s a rank; Adam on the host at 40 GB/s a rank's share of its memory."""
    owned = refit_bytes(config, shape) / 2 / training_ranks(config, world)
    per_update = owned * config.optimizer.cpu_offload * (8 / 10e9 + 28 / 40e9)
    return per_update * config.updates_per_step


def _rollout_seconds(
    config: RunConfig, shape: Shape, gpu: Gpu, world: int, response: float, mean: float, end: int
) -> float:
    """Decoding is bound by reading weights and cache; the longest response decides how many steps a batch takes."""
    rollout = config.rollout
    vllm = rollout.engine == "vllm"
    ranks = rollout.tensor if vllm else config.parallel.tensor * config.parallel.pipeline
    samples = rollout.prompts_per_step * rollout.responses_per_prompt
    per_replica = samples / max(1, (config.rollout.ranks or world) // ranks)
    per_token = kv_bytes_per_token(shape, ranks)
    room = rollout.kv_cache_gb * GIB / (per_token * mean) if vllm else rollout.batch_size
    at_once = max(1.0, min(per_replica, rollout.batch_size, room))
    weights = engine_parameters(shape, ranks) * 2
    bandwidth = gpu.bandwidth * DECODE_UTILISATION[1 - end]
    step = (weights + at_once * per_token * (mean - response / 2)) / bandwidth + DECODE_OVERHEAD[end]
    compute = 2 * active_parameters(shape) / ranks * at_once / (gpu.flops * TRAIN_UTILISATION[1 - end])
    # A batch ends with its longest response; others take the room of those that end before.
    waves = max(1.0, per_replica * response / (at_once * rollout.max_response_tokens))
    return waves * rollout.max_response_tokens * max(step, compute)
