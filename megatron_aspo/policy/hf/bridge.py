"""Megatron-Bridge for one folder or hub id: its architecture and its weights' source; importing this takes seconds.

The bridge translates names, shapes and layouts of tensors. This module restricts it to architectures and rotary
embeddings that are computed as transformers does.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import io
import json
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_aspo.config.checks import check_layout
from megatron_aspo.config.installed import check_hugging_face
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.data.tokenizer import read_hf_config, unreadable
from megatron_aspo.errors import UserError
from megatron_aspo.policy.architecture import Architecture
from megatron_aspo.policy.hf.folder import FP8, SCALE, Place, PublishedForm

ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "MistralForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "DeepseekV3ForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
)
"""Architectures of the bridge that are computed as transformers does, on a CPU and on a GPU."""

_EXECUTION = (
    *("autocast_dtype", "fp16", "attention_softmax_in_fp32", "bias_dropout_fusion", "persist_layer_norm"),
    *("cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "gradient_accumulation_fusion", "cp_comm_type"),
    *("deallocate_pipeline_outputs", "moe_shared_expert_overlap", "mtp_num_layers", "mtp_loss_scaling_factor"),
    *("async_tensor_model_parallel_allreduce", "offload_modules", "window_size"),
)
"""Fields in which the bridge says how, not what, to compute, and those that `read_architecture` checks."""
_NO_COMPUTATION = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def _import_auto_bridge() -> Any:
    """Megatron-Bridge's AutoBridge, without the noise of its import, and without Transformer Engine if it is missing.

    One of its modules, for adapters, imports Transformer Engine unconditionally. Megatron-Core has been imported before
    and does not see the stub.
    """
    check_hugging_face()
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, root.manager.disable
    logging.disable(logging.ERROR)
    stubs: dict[str, Any] = {}
    if importlib.util.find_spec("transformer_engine") is None:
        layer = type("Linear", (torch.nn.Module,), {})
        engine, layers = (types.ModuleType(f"transformer_engine{suffix}") for suffix in ("", ".pytorch"))
        vars(engine).update(pytorch=layers, __version__="0.0")
        vars(layers).update(Linear=layer, LayerNormLinear=layer, ops=types.SimpleNamespace(Sequential=layer))
        stubs = {engine.__name__: engine, layers.__name__: layers}
    sys.modules.update(stubs)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            from megatron.bridge import AutoBridge
    finally:
        for name in stubs:
            del sys.modules[name]
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)
    for name in ("megatron.bridge", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return AutoBridge


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what the bridge prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


AutoBridge = _import_auto_bridge()
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry  # noqa: E402
from megatron.bridge.models.glm.glm45_bridge import GLM45Bridge  # noqa: E402
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource, StateDict  # noqa: E402

_grouped_experts = GLM45Bridge.mapping_registry


def _named_experts(self: Any) -> MegatronMappingRegistry:
    """The bridge's mappings for GLM-4.5, also for experts whose matrices are apart, as Megatron has them on a CPU."""
    grouped = _grouped_experts(self).mappings
    apart = [copy.copy(mapping) for mapping in grouped if ".mlp.experts.linear_fc" in mapping.megatron_param]
    for mapping in apart:
        name = mapping.megatron_param.replace(".experts.", ".experts.local_experts.*.")
        mapping.megatron_param = name.removesuffix("*")
    return MegatronMappingRegistry(*grouped, *apart)


setattr(GLM45Bridge, "mapping_registry", _named_experts)  # noqa: B010


class _Weights(SafeTensorsStateSource):
    """The text model's weights in a folder, in full precision, for the bridge; on request also MTP's and vision's."""

    def __init__(self, path: str, form: PublishedForm) -> None:
        super().__init__(path)
        self.form = form

    def get_all_keys(self) -> list[str]:
        return self.form.weights(self.places)

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        return self.form.places(super().get_all_keys())

    def kept_tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor as it is published; in `dtype` if that is FP8."""
        in_fp8 = self._stored(name).dtype in FP8
        tensor = self.load_tensors([name])[name]
        return tensor.to(dtype) if in_fp8 else tensor

    def load_tensors(self, keys_to_load: list[str]) -> dict[str, Tensor]:
        tensors = {name: self._stored(name) for name in keys_to_load}
        for name, tensor in tensors.items():
            if tensor.dtype in FP8:
                tensors[name] = self.form.plain(tensor, self._stored(name + SCALE))
        return tensors

    def _stored(self, name: str) -> Tensor:
        from safetensors import safe_open

        stored, index = self.places[name]
        with safe_open(self.path / self.key_to_filename_map[stored], framework="pt") as file:
            return file.get_slice(stored)[index]


@functools.cache
def open_bridge(path: str) -> Any:
    """The AutoBridge of a folder or hub id; it opens the weights, a `_Weights`, when they are read.

    Raises:
        UserError: the folder cannot be read, or its architecture is not supported.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = read_hf_config(path)
    except (OSError, ValueError) as error:  # invalid JSON is a ValueError
        raise unreadable(path, error) from None
    except StrictDataclassError as error:  # contradictory fields
        cause = error.__cause__
        raise unreadable(path, cause if isinstance(cause, Exception) else error) from None
    names = config.architectures or [type(config).__name__]
    if names[0] not in ARCHITECTURES:
        raise UserError(f"model.hf_path={path} is a {names[0]}, which is not supported; {', '.join(ARCHITECTURES)} are")
    bridge = AutoBridge.from_hf_pretrained(path)
    pretrained = bridge.hf_pretrained
    pretrained.config = config
    pretrained._state_dict_accessor = StateDict(_Weights(path, PublishedForm.from_config(pretrained.config, path)))
    return bridge


def read_config(path: str) -> dict[str, Any]:
    """The settings in config.json that determine the model's computations, as plain values."""
    config = json.loads(open_bridge(path).hf_pretrained.config.to_json_string(use_diff=False))
    return {name: value for name, value in config.items() if name not in _NO_COMPUTATION}


def read_architecture(config: ModelConfig, parallel: ParallelConfig, vocab_size: int) -> Architecture:
    """The shape of the model at `config.hf_path`.

    Raises:
        UserError: it cannot be read, does not fit `parallel`, or has a feature that would be computed wrongly.
    """
    bridge = open_bridge(config.hf_path)
    hf = bridge.hf_pretrained.config
    provider = bridge.to_megatron_provider(load_weights=False)
    name = f"the model at model.hf_path={config.hf_path}"
    assert vocab_size == hf.vocab_size, "the vocabulary is the tokenizer's of another model"
    rope_type = hf.rope_parameters.get("rope_type", "default")
    latent = provider.multi_latent_attention
    groups, window = getattr(hf, "n_group", None) or 1, (getattr(provider, "window_size", None) or (0,))[0]
    for feature, supported in (
        (f"hidden_act={hf.hidden_act}", hf.hidden_act == "silu"),
        (f"rope_type={rope_type}", rope_type in (("default", "yarn") if latent else ("default", "linear", "llama3"))),
        ("rotary halves that are not interleaved", not latent or hf.rope_interleave),
        # Megatron scores a group of experts by its best top_k / groups, transformers by its best two.
        ("such groups of experts", groups == 1 or hf.num_experts_per_tok == 2 * hf.topk_group),
        ("norm_topk_prob=false", getattr(hf, "norm_topk_prob", True)),
        ("tied embeddings", provider.share_embeddings_and_output_weights == hf.tie_word_embeddings),
        ("sliding-window attention", "sliding_attention" not in (getattr(hf, "layer_types", None) or ())),
        (f"sliding-window attention over {window + 1} tokens", not 0 < window < config.max_sequence_length - 1),
        ("layers without experts", not getattr(hf, "mlp_only_layers", None)),
        ("layers without experts", getattr(hf, "decoder_sparse_step", 1) == 1),
        ("a bias in its MLP", not provider.add_bias_linear),
    ):
        if not supported:
            raise UserError(f"{name} has {feature}, which is not supported")
    if config.max_sequence_length > hf.max_position_embeddings:
        raise UserError(
            f"model.max_sequence_length={config.max_sequence_length} exceeds the {hf.max_position_embeddings} "
            f"positions of {name}; lower it"
        )
    experts = provider.num_moe_experts or 0
    usual = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    transformer = {
        field.name: value
        for field in dataclasses.fields(MLATransformerConfig if latent else TransformerConfig)
        if (value := getattr(provider, field.name)) != usual.get(field.name, ...) and field.name not in _EXECUTION
    }
    if transformer.get("moe_router_enable_expert_bias"):
        transformer["moe_router_bias_update_rate"] = 0.0  # the loss does not train the bias
    sizes = {
        **{field: getattr(provider, field) for field in ("num_attention_heads", "num_query_groups", "num_layers")},
        "ffn_hidden_size": 0 if experts and provider.moe_layer_freq == 1 else provider.ffn_hidden_size,
        "shared_expert_size": (provider.moe_shared_expert_intermediate_size or 0) if experts else 0,
        "moe_ffn_hidden_size": provider.moe_ffn_hidden_size if experts else 0,
        "num_experts": experts,
        "linear_num_key_heads": provider.linear_num_key_heads if provider.experimental_attention_variant else 0,
    }
    check_layout(sizes, parallel, f"{name}: ")
    delta_net = provider.experimental_attention_variant
    if delta_net and parallel.tensor > 1 and not parallel.sequence_parallel:
        raise UserError(  # Megatron sums their norms' gradients over tensor-parallel ranks only then
            f"{name} has gated delta nets, which need sequence parallelism at parallel.tensor={parallel.tensor}; "
            "set parallel.sequence_parallel=true"
        )
    if parallel.context > 1 and (latent or delta_net):
        raise UserError(
            f"{name} has {'latent attention' if latent else 'gated delta nets'}, not tried with context "
            "parallelism here; set parallel.context=1"
        )
    inv_freq = None
    if rope_type != "default" and not latent:  # Megatron's own scaling has Llama 3.1's numbers built in
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, _ = ROPE_INIT_FUNCTIONS[rope_type](hf, torch.device("cpu"))
    return Architecture(
        transformer=transformer,
        rotary_base=provider.rotary_base,
        rotary_percent=provider.rotary_percent,
        tie_embeddings=provider.share_embeddings_and_output_weights,
        inv_freq=inv_freq,
    )
