"""The shape of a model, in Megatron's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_aspo.config.model import RMS_NORM_EPSILON, ModelConfig


@dataclass(frozen=True)
class Architecture:
    """The shape of a model.

    Attributes:
        transformer: fields of Megatron's TransformerConfig.
        rotary_base: base of the rotary embeddings' angles.
        rotary_percent: share of a head's dimensions that is rotated.
        inv_freq: [head_dim / 2], angles per position of rotary embeddings that no base defines.
    """

    transformer: dict[str, Any]
    rotary_base: float
    tie_embeddings: bool
    rotary_percent: float = 1.0
    inv_freq: torch.Tensor | None = None

    @staticmethod
    def from_config(config: ModelConfig) -> Architecture:
        """The shape that the section `model` defines itself, without `hf_path`."""
        transformer: dict[str, Any] = {
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.ffn_hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_query_groups": config.num_query_groups,
            "init_method_std": config.init_std,
            "layernorm_epsilon": RMS_NORM_EPSILON,
            "num_moe_experts": config.num_experts or None,
        }
        if config.num_experts:
            transformer |= {
                "moe_router_topk": config.moe_top_k,
                "moe_ffn_hidden_size": config.expert_hidden_size,
                # The weights of the chosen experts sum to 1; with one expert they would be 1 and teach the router
                # nothing.
                "moe_router_pre_softmax": config.moe_top_k == 1,
            }
        return Architecture(transformer, config.rotary_base, config.tie_embeddings)

    @property
    def num_experts(self) -> int:
        """Experts of a layer; 0 in a dense model."""
        return self.transformer.get("num_moe_experts") or 0

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by Megatron's names, with `kv_channels`, `num_experts`, `shared_expert_size`, and the number of
        `dense_layers`, which have no experts."""
        shape = self.transformer
        head = shape.get("kv_channels") or shape["hidden_size"] // shape["num_attention_heads"]
        integers = {name: size for name, size in shape.items() if isinstance(size, int)}
        shared = shape.get("moe_shared_expert_intermediate_size") or 0
        has_experts = shape.get("moe_layer_freq", 1)  # a list by layer, or all layers
        dense = has_experts.count(0) if isinstance(has_experts, list) else 0
        dense = dense if self.num_experts else shape["num_layers"]
        counted = {"num_experts": self.num_experts, "shared_expert_size": shared, "dense_layers": dense}
        return integers | {"kv_channels": head} | counted
