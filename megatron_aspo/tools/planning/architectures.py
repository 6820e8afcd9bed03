"""Shapes of models, from a folder's config.json or from a table of public models. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.tokenizer import text_settings
from megatron_aspo.errors import UserError

_MODELS = files(__package__).joinpath("public_models.yaml").read_text(encoding="utf-8")
PUBLIC: dict[str, dict[str, Any]] = yaml.safe_load(_MODELS)["models"]
"""Hub id -> the fields of its config.json that define the model's shape. They allow a plan without hub and weights."""


KINDS = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"),
    *("glm4_moe", "glm4_moe_lite", "deepseek_v3", "kimi_k2"),
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
)
"""Values of `model_type`."""
_ONLY_EXPERTS = ("qwen3_moe", "qwen3_next", "qwen3_5_moe_text")


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: the ranks and head sizes of its low-rank projections."""

    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class DeltaNet:
    """Gated delta nets in some of the layers.

    Attributes:
        width: of the convolution.
        attention: whether a layer has attention instead, by layer.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    width: int
    attention: tuple[bool, ...]

    @property
    def key_size(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        ffn_size: feed-forward size of a dense layer; 0 if every layer has experts.
        delta_net: None without gated delta nets; a model that has them also gates attention and shared experts.
        dense_layers: number of first layers without experts; all layers of a dense model.
        shared_size: feed-forward size of the experts that every token visits.
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
    latent: Latent | None = None
    delta_net: DeltaNet | None = None
    max_positions: int = 1 << 30

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def has_attention(self, layer: int) -> bool:
        return self.delta_net is None or self.delta_net.attention[layer]

    def attention_layers(self) -> int:
        return sum(map(self.has_attention, range(self.num_layers)))

    def has_experts(self, layer: int) -> bool:
        return layer >= self.dense_layers


def find_hf_config(path: str) -> dict[str, Any]:
    """The config.json of a folder, of a downloaded hub model, or of a model in `PUBLIC`.

    Raises:
        UserError: none of them exists.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        cached = None if Path(path).is_absolute() else _downloaded(path, "config.json")
        if cached is None:
            if path in PUBLIC:
                return text_settings(PUBLIC[path])
            raise UserError(
                f"model.hf_path={path} has no config.json here, and its shape is unknown (known: "
                f"{', '.join(PUBLIC)}); give a folder that has one, or run: hf download {path} config.json"
            )
        file = Path(cached)
    try:
        return text_settings(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}; it should be a model's config.json") from None


def _downloaded(path: str, name: str) -> str | None:
    """Path of a downloaded file of a hub model. A plan needs no Hugging Face packages."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(path, name)
    except HFValidationError:  # no id of the hub
        return None
    return file if isinstance(file, str) else None


@contextlib.contextmanager
def local_config(config: RunConfig) -> Iterator[RunConfig]:
    """Replace a hub model by a folder with its config.json, and kernels that only a GPU has (`moe_dispatcher=flex`)."""
    config = replace(config, parallel=replace(config.parallel, moe_dispatcher="alltoall"))
    path = config.model.hf_path
    if not path or (Path(path) / "config.json").is_file():
        yield config
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(find_hf_config(path)))
        yield replace(config, model=replace(config.model, hf_path=folder))


def shape_of(config: ModelConfig, vocab_size: int) -> Shape:
    """Shape of a run's model. `vocab_size` is the tokenizer's, for a model without files."""
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
    """Shape in a config.json.

    Raises:
        UserError: an unknown architecture, or a missing field.
    """
    kind = hf.get("model_type")
    if kind not in KINDS:
        raise UserError(f"model.hf_path={path} is a {kind} model; {', '.join(KINDS)} are known")
    if hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1:
        raise UserError(
            f"model.hf_path={path} has layers without experts among layers with experts, which is not supported"
        )
    try:
        layers = hf["num_hidden_layers"]
        # Names by the models' authors, by transformers 5, and by DeepSeek.
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        experts = next((hf[name] for name in names if hf.get(name)), 0)
        shape = {
            "num_layers": layers,
            "hidden_size": hf["hidden_size"],
            "num_heads": hf["num_attention_heads"],
            "num_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
            "head_dim": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            "ffn_size": 0 if kind in _ONLY_EXPERTS else hf["intermediate_size"],
            "vocab_size": hf["vocab_size"],
            "tied": hf.get("tie_word_embeddings", False),
            "qkv_bias": kind == "qwen2" or bool(hf.get("attention_bias")),
            "qk_norm": kind.startswith("qwen3") or bool(hf.get("use_qk_norm")),
            "max_positions": hf.get("max_position_embeddings", 1 << 30),
            "dense_layers": layers,
        }
        if experts:
            shape |= {
                "num_experts": experts,
                "top_k": hf["num_experts_per_tok"],
                "expert_size": hf["moe_intermediate_size"],
                "shared_size": hf.get("shared_expert_intermediate_size")
                or hf["moe_intermediate_size"] * (hf.get("n_shared_experts") or 0),
                "dense_layers": hf.get("first_k_dense_replace", (hf.get("mlp_layer_types") or []).count("dense")),
            }
        if hf.get("linear_num_value_heads"):
            shape["delta_net"] = DeltaNet(
                hf["linear_num_key_heads"],
                hf["linear_key_head_dim"],
                hf["linear_num_value_heads"],
                hf["linear_value_head_dim"],
                hf["linear_conv_kernel_dim"],
                _attention_layers(hf, path),
            )
        if hf.get("kv_lora_rank"):
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


def _attention_layers(hf: Mapping[str, Any], path: str) -> tuple[bool, ...]:
    """Whether each layer has attention instead of a gated delta net."""
    count, interval = hf["num_hidden_layers"], hf.get("full_attention_interval") or 4
    kinds = hf.get("layer_types")
    if not kinds:
        return tuple((i + 1) % interval == 0 for i in range(count))
    if len(kinds) != count or set(kinds) - {"full_attention", "linear_attention"}:
        raise UserError(
            f"the config.json of model.hf_path={path} should have full_attention or linear_attention in layer_types "
            f"for each of its {count} layers; it has {len(kinds)} of {', '.join(sorted(map(str, set(kinds))))}"
        )
    return tuple(kind == "full_attention" for kind in kinds)
