"""Checks of a model against a layout. Imports no torch."""

from __future__ import annotations

from megatron_aspo.config.checks import check_layout, check_router_replay, check_world_size, config_warnings
from megatron_aspo.config.fp8 import check_fp8_layout
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.tools.planning.architectures import Shape
from megatron_aspo.tools.planning.engine import kv_bytes_per_token, state_bytes
from megatron_aspo.tools.planning.gpus import GIB
from megatron_aspo.tools.planning.layout import data_parallel_size, micro_batches


def check_plan(config: RunConfig, shape: Shape, world: int) -> None:
    """Raise UserError for the first setting that would keep the run from starting."""
    what = f"the model at model.hf_path={config.model.hf_path}: " if config.model.hf_path else "model."
    sizes = {
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_heads if shape.latent else shape.num_kv_heads,
        "ffn_hidden_size": shape.ffn_size,
        "shared_expert_size": shape.shared_size,
        "moe_ffn_hidden_size": shape.expert_size,
        "num_layers": shape.num_layers,
        "num_experts": shape.num_experts,
        "linear_num_key_heads": shape.delta_net.key_heads if shape.delta_net else 0,
    }
    check_layout(sizes, config.parallel, what)
    check_router_replay(config.train, shape.num_experts)
    latent = {"kv_lora_rank": shape.latent.kv_rank} if shape.latent else {}
    fp8_sizes = sizes | latent | {"hidden_size": shape.hidden_size, "kv_channels": shape.head_dim}
    fp8_sizes["dense_layers"] = shape.dense_layers
    check_fp8_layout(fp8_sizes, config.fp8, config.parallel, what)
    check_world_size(config.parallel, config.rollout, world)
    if config.model.max_sequence_length > shape.max_positions:
        raise UserError(
            f"model.max_sequence_length={config.model.max_sequence_length} exceeds the {shape.max_positions} positions "
            f"of {what.rstrip(': ')}; lower it"
        )
    if (shape.latent or shape.delta_net) and config.parallel.context > 1:
        kind = "latent attention is" if shape.latent else "gated delta nets are"
        raise UserError(f"{kind} not tested with context parallelism; set parallel.context=1")
    samples = config.train.mini_batch_prompts * config.rollout.responses_per_prompt
    shares = data_parallel_size(config, world)
    if samples < shares:
        raise UserError(
            f"an update of train.mini_batch_prompts={config.train.mini_batch_prompts} x rollout.responses_per_prompt="
            f"{config.rollout.responses_per_prompt} samples leaves some of {shares} data-parallel ranks without any; "
            "raise one, or parallel.pipeline, or take fewer GPUs"
        )
    if config.rollout.engine == "vllm":
        _check_engine(config, shape)


def _check_engine(config: RunConfig, shape: Shape) -> None:
    rollout = config.rollout
    for name, size in (
        ("attention heads", shape.num_heads),
        ("feed-forward size", shape.ffn_size),
        ("expert size", shape.expert_size),
        ("shared experts' size", shape.shared_size),
    ):
        if size % rollout.tensor:
            raise UserError(
                f"vLLM cannot spread {name} {size} over rollout.tensor={rollout.tensor} ranks; make it a divisor"
            )
    few, many = sorted((shape.num_kv_heads, rollout.tensor))
    if shape.latent is None and many % few:
        raise UserError(
            f"vLLM cannot spread {shape.num_kv_heads} key-value heads over rollout.tensor={rollout.tensor} ranks; make "
            "it a divisor or a multiple"
        )
    needed = kv_bytes_per_token(shape, rollout.tensor) * config.model.max_sequence_length
    needed += state_bytes(shape, rollout.tensor)
    if rollout.kv_cache_gb * GIB < needed:
        raise UserError(
            f"rollout.kv_cache_gb={rollout.kv_cache_gb:g} does not hold one sequence of model.max_sequence_length="
            f"{config.model.max_sequence_length} tokens; make it at least {needed / GIB:.2f}"
        )


def plan_notes(config: RunConfig, shape: Shape, world: int) -> list[str]:
    """Warnings about settings that run but may be unintended, a line each."""
    notes = config_warnings(config)
    if 1 < config.updates_per_step < 4:
        notes.append(
            f"{config.updates_per_step} optimizer updates per rollout batch: the importance ratios of "
            f"loss.objective={config.loss.objective} stay close to 1; 4 or more are usual"
        )
    per_node = config.cluster.gpus_per_node if config.cluster else 8
    for name, size in (("parallel.tensor", config.parallel.tensor), ("rollout.tensor", config.rollout.tensor)):
        if size > per_node:
            notes.append(f"{name}={size} spans nodes of {per_node} GPUs, so its all-reduces cross the network")
    if config.parallel.moe_dispatcher == "flex":
        notes.append(
            "parallel.moe_dispatcher=flex is planned as alltoall: the time and buffers of its own kernels are unknown"
        )
    count, stages = micro_batches(config, world), config.parallel.pipeline
    idle = (stages - 1) / (count * config.parallel.virtual_pipeline + stages - 1)
    if idle > 0.3:
        notes.append(
            f"{count} micro-batches per update over {stages} pipeline stages: {idle:.0%} of the update is the "
            "pipeline's bubble; lower train.max_tokens_per_micro_batch or parallel.pipeline, raise "
            "parallel.virtual_pipeline, or enlarge the mini-batch"
        )
    return notes
