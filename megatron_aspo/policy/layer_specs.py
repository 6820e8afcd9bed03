"""Layers of a model: Transformer Engine's on a GPU; Megatron's own on a CPU."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_linear_attention_pattern,
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.ssm.gated_delta_net import common as mcore_delta_net
from megatron.core.ssm.gated_delta_net.gdn import GatedDeltaNet
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_aspo.config import installed
from megatron_aspo.errors import UserError
from megatron_aspo.policy.cpu import gated_delta, layers

LAYERS_VARIABLE = "MEGATRON_ASPO_LAYERS"
"""Environment variable: "auto" (Transformer Engine's layers on a GPU), or "local" (Megatron's own there too: slow,
without FP8; `gpu-check` takes them on a machine that has no Transformer Engine)."""


def uses_engine() -> bool:
    """Whether layers are Transformer Engine's.

    Raises:
        UserError: `LAYERS_VARIABLE` has an unknown value.
    """
    choice = os.environ.get(LAYERS_VARIABLE, "auto")
    if choice not in ("auto", "local"):
        raise UserError(f"{LAYERS_VARIABLE}={choice} is none of auto, local; unset it")
    return choice == "auto" and torch.cuda.is_available()


def block_spec(config: TransformerConfig, stage: int | None = None) -> ModuleSpec | TransformerBlockSubmodules:
    """Layers of a chunk (`stage`: virtual) or of a pipeline stage: Transformer Engine's on a GPU; Megatron's own on a
    CPU, with the norm and attention of `cpu.layers`."""
    delta_net = config.experimental_attention_variant == "gated_delta_net"
    if delta_net:
        if config.fp8:
            raise UserError("gated delta nets have not been tried in FP8; set fp8.recipe=null")
        assert hasattr(GatedDeltaNet, "_resolve_cu_seqlens"), "this Megatron-Core finds segments by another function"
        setattr(GatedDeltaNet, "_resolve_cu_seqlens", staticmethod(_segments))  # noqa: B010
    if uses_engine():
        if importlib.util.find_spec("transformer_engine") is None:
            raise UserError(
                f"packed sequences on a GPU need Transformer Engine; install it: {installed.INSTALL_FOR_GPUS}"
            )
        if not config.bf16:
            raise UserError(
                "packed attention on a GPU has no float32 kernel; set model.dtype=bfloat16, or CUDA_VISIBLE_DEVICES to "
                "nothing to run on the CPU"
            )
        if delta_net:
            if not mcore_delta_net.HAVE_FLA:
                raise UserError("gated delta nets on a GPU need kernels; pip install flash-linear-attention")
            return get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=stage)
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=stage)
    first, count = get_transformer_layer_offset(config, stage), get_num_layers_to_build(config, stage)
    frequency = config.moe_layer_freq  # 1 puts experts in every layer
    has_experts = [bool(f) for f in (frequency if isinstance(frequency, list) else [1] * config.num_layers)]
    if delta_net:
        gated_delta.install()
    linear = map(bool, get_linear_attention_pattern(config))
    kinds = [(bool(config.num_moe_experts) and experts, net) for experts, net in zip(has_experts, linear, strict=True)]
    specs = {kind: _local_layer(config, *kind) for kind in set(kinds)}
    local = [specs[kind] for kind in kinds[first : first + count]]
    return TransformerBlockSubmodules(layer_specs=local, layer_norm=layers.RMSNorm)


def _segments(padded: Any, actual: Any, *_: Any, **__: Any) -> Any:
    """The segments of a packed stream. Megatron's own function also compares them with the stream's length, for which
    the host waits for the GPU four times in every layer; `packing` makes them fit."""
    assert padded is None, "segments include their padding"
    return actual


def _local_layer(config: TransformerConfig, experts: bool, delta_net: bool) -> ModuleSpec:
    """Megatron's own layer, as a CPU needs it, with attention or a gated delta net."""
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm",
        num_experts=config.num_moe_experts if experts else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    layer: Any = spec.submodules
    if experts:
        moe = layer.mlp.keywords["submodules"]
        if config.perform_initialization:
            moe.experts = partial(layers.build_experts, moe.experts)
        # The map has a dense layer's names for checkpoints; Transformer Engine keeps this norm apart from experts.
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    layer.input_layernorm = layer.pre_mlp_layernorm = layers.RMSNorm
    if delta_net:
        parts = mcore_delta_net.GatedDeltaNetSubmodules(ColumnParallelLinear, layers.RMSNorm, RowParallelLinear)
        layer.self_attention = ModuleSpec(GatedDeltaNet, submodules=parts)
        return spec
    attention = layer.self_attention.submodules
    attention.core_attention = layers.PackedAttention
    if config.qk_layernorm:
        for name in ("q_layernorm", "kv_layernorm" if config.multi_latent_attention else "k_layernorm"):
            setattr(attention, name, layers.RMSNorm)
    if config.multi_latent_attention:  # Transformer Engine has these norms within the linear layers
        for x in ("q", "kv"):
            within = f"self_attention.linear_{x}_up_proj.layer_norm_"
            layer.sharded_state_dict_keys_map[f"self_attention.{x}_layernorm."] = within
    return spec
