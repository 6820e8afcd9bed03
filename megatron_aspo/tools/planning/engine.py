"""The rollout engine's memory and speed on a rank, computed from the model's shape. Imports no torch."""

from __future__ import annotations

import functools
from typing import Literal

from megatron_aspo.config.checks import stage_layers
from megatron_aspo.config.run import RunConfig
from megatron_aspo.tools.planning.architectures import Shape
from megatron_aspo.tools.planning.gpus import GIB, Gpu

RUNTIME = int(3.5 * GIB)
"""Assumed, not measured: CUDA context, NCCL's and cuBLAS's buffers, CUDA graphs, fragmentation."""

PREFILL_TOKENS = 16384
"""Tokens that vLLM prefills at once on GPUs of this size; its default."""

DECODE_BANDWIDTH = (0.35, 0.7)
"""Assumed share of a GPU's memory bandwidth while decoding."""

DECODE_FLOPS = (0.25, 0.45)
"""Assumed share of a GPU's bfloat16 peak while decoding."""

DECODE_OVERHEAD = (0.02, 0.006)
"""Assumed further seconds per decoding step: kernel launches, collectives, the scheduler."""

State = Literal["awake", "refit", "asleep", "absent"]
"""State of the engine in a phase: it samples; it takes weights; the policy trains; it is not on this GPU yet."""


def beside(config: RunConfig, shape: Shape, state: State, stage: int) -> dict[str, int]:
    """Bytes on the GPU of a training rank of a pipeline stage, besides the policy's tensors, by component."""
    parts = {"runtime (assumed)": RUNTIME}
    if config.rollout.engine != "vllm":
        return parts | (_embedded_cache(config, shape, stage) if state == "awake" else {})
    if config.rollout.ranks or state == "absent":
        return parts
    kept = _model(config, shape) | _cache(config)
    light = {} if config.rollout.sleep_level else kept
    if state == "asleep":
        return parts | light
    return parts | (kept | _activations(config, shape) if state == "awake" else _refit(config, shape) | light)


def generator_memory(config: RunConfig, shape: Shape) -> dict[str, dict[str, int]]:
    """Phase -> component -> bytes of a rank that only samples, which never sleeps; empty without such ranks."""
    if not config.rollout.ranks:
        return {}
    kept = {"runtime (assumed)": RUNTIME} | _model(config, shape) | _cache(config)
    return {"rollout": kept | _activations(config, shape), "refit": kept | _refit(config, shape)}


def host_beside(config: RunConfig, shape: Shape) -> int:
    """Bytes of host memory of a sleeping engine."""
    colocated = config.rollout.engine == "vllm" and not config.rollout.ranks
    return sum(_model(config, shape).values()) if colocated and config.rollout.sleep_level == 1 else 0


def _model(config: RunConfig, shape: Shape) -> dict[str, int]:
    """Weights. FP8 is for matrices only, not for embedding and head."""
    rollout, element = config.rollout, _element(config)
    tables = (1 if shape.tied else 2) * -(-shape.vocab_size // rollout.tensor) * shape.hidden_size
    matrices = engine_parameters(shape, rollout.tensor) - tables
    return {"vLLM weights": tables * element + matrices * (1 if rollout.quantization == "fp8" else element)}


def _cache(config: RunConfig) -> dict[str, int]:
    return {"KV cache": int(config.rollout.kv_cache_gb * GIB)}


def _activations(config: RunConfig, shape: Shape) -> dict[str, int]:
    """A layer of a prefill, and the logits of a batch: in float32, tempered, and their log-softmax."""
    rollout = config.rollout
    widest = max(shape.ffn_size, shape.top_k * shape.expert_size) // rollout.tensor
    layer = PREFILL_TOKENS * (4 * shape.hidden_size + 3 * max(widest, shape.hidden_size)) * _element(config)
    return {"vLLM activations": layer + 3 * rollout.batch_size * shape.vocab_size * 4}


def _refit(config: RunConfig, shape: Shape) -> dict[str, int]:
    """Weights, a bucket, and the loaded tensors of one module: vLLM keeps them whole until all have come and copies the
    rank's shard then (`vllm.model_executor.model_loader.reload.layerwise`)."""
    h, element = shape.hidden_size, _element(config)
    experts = shape.num_experts * 3 * h * shape.expert_size
    module = max(shape.vocab_size * h, 2 * h * max(shape.ffn_size, shape.shared_size), experts) * element
    whole = {"module being loaded": module + module // config.rollout.tensor}
    return _model(config, shape) | {"refit bucket": config.rollout.refit_bucket_mb << 20} | whole


def _embedded_cache(config: RunConfig, shape: Shape, stage: int) -> dict[str, int]:
    """Keys and values of a stage's layers if the training model samples."""
    layers = stage_layers(shape.num_layers, config.parallel)[stage]
    per_token = kv_bytes_per_token(shape, config.parallel.tensor, _element(config)) * layers // shape.num_layers
    return {"KV cache": config.rollout.batch_size * config.model.max_sequence_length * per_token}


def _element(config: RunConfig) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def layer_parameters(shape: Shape, layer: int, tensor: int) -> tuple[int, int]:
    """(parameters besides experts, parameters of all experts) of one layer on a rank of `tensor` ranks."""
    h, net = shape.hidden_size, shape.delta_net
    if net and not shape.has_attention(layer):
        projected = 2 * (net.key_size + net.value_size + net.value_heads)
        convolved = net.width * (2 * net.key_size + net.value_size)
        attention = (h * (projected + net.value_size) + convolved + 2 * net.value_heads) // tensor + net.value_dim
    elif latent := shape.latent:  # the projections to the latents are on every rank
        down = h * (latent.q_rank + latent.kv_rank + latent.rope_dim) + latent.q_rank + latent.kv_rank
        q_up = latent.q_rank * shape.num_heads * (latent.nope_dim + latent.rope_dim)
        kv_up = latent.kv_rank * shape.num_heads * (latent.nope_dim + latent.value_dim)
        attention = down + (q_up + kv_up + shape.num_heads * latent.value_dim * h) // tensor
    else:
        kv_size = max(shape.kv_size // tensor, shape.head_dim)  # fewer key-value heads than ranks are repeated
        attention = (shape.query_size // tensor + 2 * kv_size) * (h + shape.qkv_bias) + shape.query_size * h // tensor
        attention += 2 * shape.head_dim * shape.qk_norm + h * shape.query_size // tensor * bool(net)
    dense = attention + 2 * h  # two norms
    if not shape.has_experts(layer):
        return dense + 3 * h * shape.ffn_size // tensor, 0
    dense += h * (shape.num_experts + bool(net))  # the router is on every rank
    dense += 3 * h * shape.shared_size // tensor
    return dense, shape.num_experts * 3 * h * shape.expert_size // tensor


@functools.cache
def engine_parameters(shape: Shape, tensor: int) -> int:
    """Parameters on a rank of a replica of `tensor` ranks; with 1 those of the whole model."""
    layers = sum(sum(layer_parameters(shape, i, tensor)) for i in range(shape.num_layers))
    tables = 1 if shape.tied else 2
    return layers + tables * -(-shape.vocab_size // tensor) * shape.hidden_size + shape.hidden_size


@functools.cache
def active_parameters(shape: Shape) -> int:
    """Parameters that a token is multiplied with: those of `top_k` experts, without the embedding's table."""
    total = shape.vocab_size * shape.hidden_size
    for i in range(shape.num_layers):
        dense, experts = layer_parameters(shape, i, 1)
        total += dense + (experts // shape.num_experts * shape.top_k if experts else 0)
    return total


@functools.cache
def kv_bytes_per_token(shape: Shape, tensor: int, element: int = 2) -> int:
    """Bytes per token in the rollout engine's cache on a rank of a replica; MLA's latents are whole on every rank.
    Gated delta nets have `state_bytes` instead."""
    if shape.latent is not None:
        return shape.num_layers * (shape.latent.kv_rank + shape.latent.rope_dim) * element
    heads = max(1, shape.num_kv_heads // tensor)
    return shape.attention_layers() * 2 * heads * shape.head_dim * element


@functools.cache
def state_bytes(shape: Shape, tensor: int, element: int = 2) -> int:
    """Bytes per response in the cache of a rank of a replica for gated delta nets, whatever its length: matrices in
    float32, as Qwen3.5's config.json requests of vLLM (its default for Qwen3-Next is half of it), and the inputs that
    the convolutions still need."""
    if (net := shape.delta_net) is None:
        return 0
    matrices = net.value_heads * net.key_dim * net.value_dim * 4
    inputs = (net.width - 1) * (2 * net.key_size + net.value_size) * element
    return (shape.num_layers - shape.attention_layers()) * (matrices + inputs) // tensor


def decode_step_seconds(
    config: RunConfig, shape: Shape, gpu: Gpu, running: float, cached: float
) -> tuple[float, float]:
    """Slowest and fastest time of one token for each of `running` responses of a replica, with `cached` tokens in its
    cache: reading weights and cache, or arithmetic."""
    vllm = config.rollout.engine == "vllm"
    ranks = config.rollout.tensor if vllm else config.parallel.tensor * config.parallel.pipeline
    weights = sum(_model(config, shape).values()) if vllm else engine_parameters(shape, ranks) * _element(config)
    moved = weights + cached * kv_bytes_per_token(shape, ranks)
    moved += running * 2 * state_bytes(shape, ranks)  # read and written
    flops = 2 * active_parameters(shape) / ranks * running
    slowest, fastest = (
        max(moved / (gpu.bandwidth * bandwidth) + overhead, flops / (gpu.flops * speed))
        for bandwidth, overhead, speed in zip(DECODE_BANDWIDTH, DECODE_OVERHEAD, DECODE_FLOPS, strict=True)
    )
    return slowest, fastest


def decode_seconds(config: RunConfig, shape: Shape, gpu: Gpu, world: int, length: float) -> tuple[float, float]:
    """Slowest and fastest time to sample a step's responses, whose mean length is `length` times the limit.

    Decoding is bound by reading weights and cache; the longest response sets the number of steps of a batch.
    """
    rollout = config.rollout
    vllm = rollout.engine == "vllm"
    ranks = rollout.tensor if vllm else config.parallel.tensor * config.parallel.pipeline
    samples = rollout.prompts_per_step * rollout.responses_per_prompt
    per_replica = samples / max(1, (rollout.ranks or world) // ranks)
    response = rollout.max_response_tokens * length
    mean = (config.model.max_sequence_length - rollout.max_response_tokens) * length + response
    each = kv_bytes_per_token(shape, ranks) * mean + state_bytes(shape, ranks)
    room = rollout.kv_cache_gb * GIB / each if vllm else rollout.batch_size
    at_once = max(1.0, min(per_replica * rollout.oversample, rollout.batch_size, room))
    step = decode_step_seconds(config, shape, gpu, at_once, at_once * (mean - response / 2))
    # A batch ends with its longest response; waiting ones take the place of finished ones. With `oversample` that one
    # may be written in several batches.
    batches = rollout.max_age + 1 if rollout.oversample > 1 else 1
    steps = max(1 / batches, per_replica * length / at_once) * rollout.max_response_tokens
    return steps * step[0], steps * step[1]
