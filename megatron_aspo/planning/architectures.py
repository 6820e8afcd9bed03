"""Shapes of models: from a folder's config.json, or from what is known of public ones; imports no torch.

`PUBLIC` holds what the config.json of each model on the Hugging Face hub says of its shape, so that a run can be
planned where neither the hub nor the weights are. A folder's own config.json goes before it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_aspo.config import ModelConfig
from megatron_aspo.errors import UserError

_QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "output_router_logits": False,
}
_QWEN2_5_32B = _QWEN2_5 | {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
}
_QWEN2_5_72B = _QWEN2_5 | {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
_LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
_DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,  # predicts a second token, and is neither trained nor sampled with here
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}

PUBLIC: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2_5
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 131072,
        "rope_theta": 10000.0,
    },
    "Qwen/Qwen2.5-32B": _QWEN2_5_32B | {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
    "Qwen/Qwen2.5-32B-Instruct": _QWEN2_5_32B,
    "Qwen/Qwen2.5-72B": _QWEN2_5_72B | {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
    "Qwen/Qwen2.5-72B-Instruct": _QWEN2_5_72B,
    "Qwen/Qwen3-32B": _QWEN3
    | {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "Qwen/Qwen3-30B-A3B": _QWEN3_MOE
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
    },
    "Qwen/Qwen3-235B-A22B": _QWEN3_MOE
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_3_70B,
    "deepseek-ai/DeepSeek-V3": _DEEPSEEK_V3,
}
"""Hub id -> the fields of its config.json that say the model's shape."""


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: the ranks and head sizes of its low-rank projections."""

    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder.

    Attributes:
        ffn_size: of a dense layer; 0 where every layer has experts.
        dense_layers: how many layers, the first ones, have no experts. All of them in a dense model.
        shared_size: feed-forward size of the experts that every token goes to.
        expert_bias: the router has a bias per expert (a buffer, not a parameter).
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    top_k: int = 0
    expert_size: int = 0
    shared_size: int = 0
    dense_layers: int = 0
    expert_bias: bool = False
    latent: Latent | None = None
    max_positions: int = 1 << 30

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def has_experts(self, layer: int) -> bool:
        return layer >= self.dense_layers


def find_hf_config(path: str) -> dict[str, Any]:
    """The config.json of a folder, of a hub model that has been downloaded, or of a known public model.

    Raises:
        UserError: there is none.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        cached = None if Path(path).is_absolute() else _downloaded(path, "config.json")
        if cached is None:
            if path in PUBLIC:
                return PUBLIC[path]
            raise UserError(
                f"model.hf_path={path} has no config.json here, and its shape is not among those known "
                f"({', '.join(PUBLIC)}); give a folder that has one"
            )
        file = Path(cached)
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}; it should be a model's config.json") from None


def _downloaded(path: str, name: str) -> str | None:
    """The file of a hub model where it has been downloaded to; a plan needs no Hugging Face packages."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(path, name)
    except HFValidationError:  # no id of the hub
        return None
    return file if isinstance(file, str) else None


def shape_of(config: ModelConfig, vocab_size: int) -> Shape:
    """The shape of a run's model; `vocab_size` is the tokenizer's where the model does not say it."""
    if config.hf_path:
        return shape_of_hf(find_hf_config(config.hf_path), config.hf_path)
    return Shape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_query_groups,
        head_dim=config.hidden_size // config.num_attention_heads,
        ffn_size=0 if config.num_experts else config.ffn_hidden_size,
        vocab_size=vocab_size,
        tied=config.tie_embeddings,
        num_experts=config.num_experts,
        top_k=config.moe_top_k if config.num_experts else 0,
        expert_size=config.expert_hidden_size if config.num_experts else 0,
        dense_layers=0 if config.num_experts else config.num_layers,
    )


def shape_of_hf(hf: Mapping[str, Any], path: str) -> Shape:
    """The shape that a config.json describes.

    Raises:
        UserError: it is of an architecture that is not known here, or lacks a field.
    """
    kind = hf.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3"):
        raise UserError(
            f"model.hf_path={path} is a {kind} model; llama, qwen2, qwen3, qwen3_moe, deepseek_v3 are known"
        )
    if hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1:
        raise UserError(f"model.hf_path={path} has layers without experts among those with, which is not supported")
    try:
        layers = hf["num_hidden_layers"]
        # By the models' authors, by transformers 5, and by DeepSeek.
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        experts = next((hf[name] for name in names if hf.get(name)), 0)
        shape = {
            "num_layers": layers,
            "hidden_size": hf["hidden_size"],
            "num_heads": hf["num_attention_heads"],
            "num_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
            "head_dim": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            "ffn_size": 0 if kind == "qwen3_moe" else hf["intermediate_size"],
            "vocab_size": hf["vocab_size"],
            "tied": hf.get("tie_word_embeddings", False),
            "qkv_bias": kind == "qwen2" or bool(hf.get("attention_bias")),
            "qk_norm": kind in ("qwen3", "qwen3_moe"),
            "max_positions": hf.get("max_position_embeddings", 1 << 30),
            "dense_layers": layers,
        }
        if experts:
            shape |= {
                "num_experts": experts,
                "top_k": hf["num_experts_per_tok"],
                "expert_size": hf["moe_intermediate_size"],
                "shared_size": hf["moe_intermediate_size"] * (hf.get("n_shared_experts") or 0),
                "dense_layers": hf.get("first_k_dense_replace", 0),
                "expert_bias": kind == "deepseek_v3",
            }
        if kind == "deepseek_v3":
            shape["latent"] = Latent(
                hf["q_lora_rank"],
                hf["kv_lora_rank"],
                hf["qk_nope_head_dim"],
                hf["qk_rope_head_dim"],
                hf["v_head_dim"],
            )
            shape["head_dim"] = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
    except KeyError as error:
        raise UserError(f"the config.json of model.hf_path={path} lacks {error}") from None
    return Shape(**shape)
