"""Hugging Face weights to Megatron-Core and back, by Megatron-Bridge; importing this takes seconds.

The bridge translates names, shapes and layouts of tensors. What it would leave to chance is settled here: which
architectures, which kinds of rotary embeddings, and that no tensor is missing or left over.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import json
import logging
import os
import shutil
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.config import ModelConfig, ParallelConfig
from megatron_aspo.config_checks import check_hugging_face, check_layout
from megatron_aspo.errors import UserError
from megatron_aspo.policy.hf_folder import FP8, SCALE, PublishedForm, copy_configuration, listed, local_folder
from megatron_aspo.policy.model import Architecture
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.run_folder import PARTIAL_SUFFIX
from megatron_aspo.tokenizer import unreadable

ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV3ForCausalLM",
)
"""The bridge knows more; for these our layers on a CPU and on a GPU compute what transformers does."""

MAX_SHARD_BYTES = 2 << 30
"""Of one file of an exported model, and so what rank 0 holds besides its part of the model."""

_TRANSFORMER_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "layernorm_epsilon",
    "init_method_std",
    "add_qkv_bias",
    "qk_layernorm",
    "num_moe_experts",
)
_EXPERT_FIELDS = (
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_router_pre_softmax",
    "moe_layer_freq",
    "moe_shared_expert_intermediate_size",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
)
_LATENT_FIELDS = (
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rope_type",
    "rotary_base",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_NO_COMPUTATION = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def _import_auto_bridge() -> Any:
    """Megatron-Bridge's AutoBridge, without the noise of its import, and without Transformer Engine if need be.

    One of its modules, for adapters, imports Transformer Engine unconditionally. Megatron-Core, which is imported by
    now, has found out already that there is none.
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
        with warnings.catch_warnings(), _quiet():
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
def _quiet() -> Iterator[None]:
    """The bridge prints its progress and thoughts."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


AutoBridge = _import_auto_bridge()
from megatron.bridge.models.conversion.model_bridge import _megatron_local_name_to_global  # noqa: E402
from megatron.bridge.models.conversion.utils import persistent_buffers  # noqa: E402
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource, StateDict  # noqa: E402


class _Weights(SafeTensorsStateSource):
    """The model's weights in a folder, for the bridge: in full precision, and nothing else."""

    def __init__(self, path: str, form: PublishedForm) -> None:
        super().__init__(path)
        self._form = form

    def get_all_keys(self) -> list[str]:
        return self._form.weights(super().get_all_keys())

    def load_tensors(self, keys_to_load: list[str]) -> dict[str, Tensor]:
        tensors = super().load_tensors(keys_to_load)
        for name, tensor in tensors.items():
            if tensor.dtype in FP8:
                scale = name + SCALE
                tensors[name] = self._form.plain(tensor, super().load_tensors([scale])[scale])
        return tensors


def _bridge(path: str) -> Any:
    """The bridge of a folder or hub id; it opens the weights when they are asked for."""
    return _opened(path)[0]


@functools.cache
def _opened(path: str) -> tuple[Any, PublishedForm]:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:  # what is not JSON is a ValueError too
        raise unreadable(path, error) from None
    except StrictDataclassError as error:  # fields that contradict each other
        cause = error.__cause__
        raise unreadable(path, cause if isinstance(cause, Exception) else error) from None
    names = config.architectures or [type(config).__name__]
    if names[0] not in ARCHITECTURES:
        raise UserError(f"model.hf_path={path} is a {names[0]}, which is not supported; {', '.join(ARCHITECTURES)} are")
    bridge = AutoBridge.from_hf_pretrained(path)
    pretrained = bridge.hf_pretrained
    form = PublishedForm.take_from(pretrained.config, path)
    pretrained._state_dict_accessor = StateDict(_Weights(path, form))
    return bridge, form


def read_config(path: str) -> dict[str, Any]:
    """What config.json says of the model's computations: plain values, without notes on where it came from."""
    config = json.loads(_bridge(path).hf_pretrained.config.to_json_string(use_diff=False))
    return {name: value for name, value in config.items() if name not in _NO_COMPUTATION}


def read_architecture(config: ModelConfig, parallel: ParallelConfig, vocab_size: int) -> Architecture:
    """The shape of the model at `config.hf_path`.

    Raises:
        UserError: it cannot be read, spread as `parallel` says, or is of a kind that would be computed wrongly.
    """
    bridge = _bridge(config.hf_path)
    hf = bridge.hf_pretrained.config
    provider = bridge.to_megatron_provider(load_weights=False)
    what = f"the model at model.hf_path={config.hf_path}"
    assert vocab_size == hf.vocab_size, "the vocabulary is the tokenizer's of another model"
    rope_type = hf.rope_parameters.get("rope_type", "default")
    latent = provider.multi_latent_attention
    for found, supported in (
        (f"hidden_act={hf.hidden_act}", hf.hidden_act == "silu"),
        (f"rope_type={rope_type}", rope_type in (("default", "yarn") if latent else ("default", "linear", "llama3"))),
        ("rotary halves that are not interleaved", not latent or hf.rope_interleave),
        # Megatron scores a group of experts by its best top_k / groups, transformers by its best two.
        ("such groups of experts", not latent or hf.n_group == 1 or hf.num_experts_per_tok == 2 * hf.topk_group),
        ("sliding-window attention", "sliding_attention" not in (getattr(hf, "layer_types", None) or ())),
        ("layers without experts", not getattr(hf, "mlp_only_layers", None)),
        ("layers without experts", getattr(hf, "decoder_sparse_step", 1) == 1),
        ("a bias in its MLP", not provider.add_bias_linear),
    ):
        if not supported:
            raise UserError(f"{what} has {found}, which is not supported")
    if config.max_sequence_length > hf.max_position_embeddings:
        raise UserError(
            f"model.max_sequence_length={config.max_sequence_length} exceeds the {hf.max_position_embeddings} "
            f"positions that {what} has been made for; lower it"
        )
    experts = provider.num_moe_experts or 0
    fields = _TRANSFORMER_FIELDS + (_EXPERT_FIELDS if experts else ()) + (_LATENT_FIELDS if latent else ())
    transformer = {name: getattr(provider, name) for name in fields}
    if transformer.get("moe_router_enable_expert_bias"):
        transformer["moe_router_bias_update_rate"] = (
            0.0  # the bias stays the model's: it is no part of the policy's loss
        )
    sizes = {
        **{name: transformer[name] for name in ("num_attention_heads", "num_query_groups", "num_layers")},
        "ffn_hidden_size": 0 if experts and provider.moe_layer_freq == 1 else provider.ffn_hidden_size,
        "shared_expert_size": (provider.moe_shared_expert_intermediate_size or 0) if experts else 0,
        "moe_ffn_hidden_size": provider.moe_ffn_hidden_size if experts else 0,
        "num_experts": experts,
    }
    check_layout(sizes, parallel, f"{what}: ")
    if latent and parallel.context > 1:
        raise UserError(
            f"{what} has latent attention, which has not been tried with context parallelism here; set "
            "parallel.context=1"
        )
    inv_freq = None
    if rope_type != "default" and not latent:  # Megatron's own scaling takes Llama 3.1's numbers for granted
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, _ = ROPE_INIT_FUNCTIONS[rope_type](hf, torch.device("cpu"))
    return Architecture(
        transformer=transformer,
        rotary_base=provider.rotary_base,
        tie_embeddings=provider.share_embeddings_and_output_weights,
        inv_freq=inv_freq,
    )


def load_weights(path: str, model: torch.nn.Module) -> None:
    """Fill this rank's part of `model` from the folder or hub id, tensor by tensor. Collective.

    Raises:
        UserError: a tensor that the model needs is not there or of another shape, or one is there that no parameter
            takes.
    """
    gpt, bridge = _unwrapped(model), _bridge(path)
    present = _stored_shapes(path)
    needed = {name for task in _tasks(bridge, gpt) for name in _hf_names(task)}
    everyones: list[Any] = [None] * dist.get_world_size()  # ranks hold different experts
    dist.all_gather_object(everyones, needed)
    needed = set[str]().union(*everyones)
    # A tied model's files may have its embeddings twice, and old ones a table that follows from the configuration.
    spare = {name for name in present if name.endswith("rotary_emb.inv_freq")}
    spare |= {_EMBEDDINGS[1]} if gpt.share_embeddings_and_output_weights else set()
    missing, extra = sorted(needed - present.keys()), sorted(present.keys() - needed - spare)
    if missing:
        raise UserError(f"model.hf_path={path} lacks {listed(missing)}, which its config.json calls for")
    if extra:
        raise UserError(f"model.hf_path={path} has {listed(extra)}, for which its config.json leaves no place")
    expected = _expected_shapes(bridge.hf_pretrained.config)
    for name in sorted(present.keys() & expected.keys()):
        if present[name] != expected[name]:
            raise UserError(
                f"model.hf_path={path}: {name} has the shape {present[name]}, its config.json says {expected[name]}"
            )
    for module in gpt.modules():
        if getattr(module, "expert_bias", None) is not None:  # else it would be rounded: Megatron casts it when it runs
            module.expert_bias.data = module.expert_bias.data.float()
    with _quiet():
        bridge.load_hf_weights([gpt])


def _stored_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """The weights of the folder or hub id, as their files say."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, tuple[tuple[int, ...], str]] = {}
    try:
        folder = local_folder(path, "*.safetensors", "*.safetensors.index.json")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        else:
            files = set(folder.glob("*.safetensors"))
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_slice(name)
                    stored[name] = tuple(tensor.get_shape()), tensor.get_dtype()
    except (OSError, ValueError, SafetensorError) as error:
        raise unreadable(path, error) from None
    if not stored:
        raise unreadable(path, ValueError("it has no *.safetensors"))
    return _opened(path)[1].shapes(stored)


def _expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """What transformers would save, under the names of files (where each expert has tensors of its own)."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        saved = revert_weight_conversion(model, model.state_dict())
    tied = _EMBEDDINGS[1] if config.tie_word_embeddings else None
    return {name: tuple(tensor.shape) for name, tensor in saved.items() if name != tied}


@dataclass(frozen=True)
class Consumed:
    """A parameter of this rank and what it is made from.

    Attributes:
        names: the tensors of the model's files.
        parts: ranks that the tensors are cut over.
    """

    parameter: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    parts: int
    is_expert: bool


def consumed_tensors(path: str, gpt: Any) -> list[Consumed]:
    """What this rank's part of the model takes from the files, without asking other ranks and without any file.

    Raises:
        UserError: the bridge does not know one of its parameters.
    """
    model_bridge = _bridge(path)._model_bridge
    model_bridge.hf_config = _bridge(path).hf_pretrained.config
    registry = model_bridge.mapping_registry()
    consumed: list[Consumed] = []
    for name, parameter in itertools.chain(gpt.named_parameters(), persistent_buffers(gpt)):
        if gpt.share_embeddings_and_output_weights and name.startswith("output_layer."):
            continue  # a copy of the embedding
        mapping = registry.megatron_to_hf_lookup(_megatron_local_name_to_global([gpt], gpt.config, name, 0))
        if mapping is None:
            raise UserError(f"Megatron-Bridge does not know the parameter {name} of a model like {path}")
        names = mapping.hf_param
        is_expert = not getattr(parameter, "allreduce", True)
        cut = getattr(parameter, "tensor_model_parallel", False)
        config = gpt.config
        ranks = config.expert_tensor_parallel_size if is_expert else config.tensor_model_parallel_size
        consumed.append(
            Consumed(
                name,
                (names,) if isinstance(names, str) else tuple(names.values()),
                tuple(parameter.shape),
                ranks if cut else 1,
                ".experts." in name,
            )
        )
    return consumed


def file_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a folder's files; where it has none, those that transformers would write for its config.json."""
    if any(Path(path).glob("*.safetensors")):
        return _stored_shapes(path)
    return _expected_shapes(_bridge(path).hf_pretrained.config)


def export_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the whole model in Hugging Face's names and shapes, one at a time. Collective: every rank must
    go through all of it, and gets every tensor whole, in the model's dtype and on its device.

    A tensor may be a parameter's own memory: copy what is to outlive the step or to be changed.

    Raises:
        UserError: the model is not a Hugging Face one.
    """
    path = policy.config.model.hf_path
    if not path:
        raise UserError("only a model that came from Hugging Face's format can go back there; set model.hf_path")
    gpt, bridge = _unwrapped(policy.model), _bridge(path)
    exported = bridge.export_hf_weights([gpt], show_progress=False, conversion_tasks=_tasks(bridge, gpt))
    for name, tensor in exported:
        whole = tensor[: policy.vocab_size] if name in _EMBEDDINGS else tensor
        yield name, whole.detach()


def save_folder(policy: Policy, folder: Path) -> None:
    """Write the model in Hugging Face's format, with the configuration and tokenizer that it came with. Collective;
    rank 0 writes, and holds no more than `MAX_SHARD_BYTES` (or one tensor) of the whole model.

    Raises:
        UserError: `folder` exists already.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or name another folder")
    dist.barrier()  # no rank may find what another has written
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    writer = _Writer(partial) if dist.get_rank() == 0 else None
    for name, tensor in export_weights(policy):
        if writer is not None:
            writer.add(name, tensor)
    if writer is not None:
        writer.close()
        copy_configuration(policy.config.model, partial)
        os.replace(partial, folder)
    dist.barrier()


class _Writer:
    """Tensors to numbered safetensors files of bounded size, and their index."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self._shard: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._shard and self._bytes + tensor.nbytes > MAX_SHARD_BYTES:
            self._flush()
        self._shard[name] = tensor.cpu().clone()
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def close(self) -> None:
        self._flush()
        count = len(self._files)
        final = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            final = ["model.safetensors"]
        for i, name in enumerate(final):
            os.replace(self._path(i), self.folder / name)
        if count > 1:
            files = {name: final[i] for i, names in enumerate(self._files) for name in names}
            index = {"metadata": {"total_size": self._total}, "weight_map": files}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        from safetensors.torch import save_file

        path = self._path(len(self._files))
        save_file(self._shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors lets nobody else read it
        self._files.append(list(self._shard))
        self._shard, self._bytes = {}, 0

    def _path(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}.safetensors"


def _tasks(bridge: Any, gpt: Any) -> list[Any]:
    """The bridge's plan: for every parameter the tensors it is made from."""
    with _quiet():
        tasks: list[Any] = bridge.get_conversion_tasks([gpt])
    if None in tasks:
        raise UserError(
            f"Megatron-Bridge does not know {sum(task is None for task in tasks)} parameters of a model like "
            f"{bridge.hf_pretrained.model_name_or_path}, which is not supported"
        )
    return tasks


def _hf_names(task: Any) -> list[str]:
    names = task.mapping.hf_param
    return [names] if isinstance(names, str) else list(names.values())


def _unwrapped(model: Any) -> Any:
    """The GPTModel inside the wrappers for data parallelism and 16-bit weights."""
    while hasattr(model, "module"):
        model = model.module
    return model
