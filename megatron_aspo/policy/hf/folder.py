"""A model's folder as it is published in Hugging Face's format, and the model's own weights in it.

DeepSeek-V3 and similar models are published with more. Weights of linear layers are in FP8, and every block has a scale
(the tensor `<weight>_scale_inv`). Layers after the last one predict further tokens (MTP). Qwen3.5 has a vision encoder,
a prefix before the names of the text model, and one tensor for all experts of a layer. This module reads weights in
full precision, by the names of a text model. MTP and vision are neither trained nor used for sampling; an export has
the published tensors.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_aspo.config.model import ModelConfig
from megatron_aspo.data.tokenizer import WITH_IMAGES, text_settings
from megatron_aspo.errors import UserError

SCALE = "_scale_inv"
"""Suffix of the scales' tensor: the weights of a block are its FP8 numbers times its scale."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_STORED_FP8 = ("F8_E4M3", "F8_E5M2")  # safetensors' names
VISION = "model.visual."
_TEXT = "model.language_model."
_MTP_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")  # DeepSeek's name and transformers'
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer, but no index of weights


def local_folder(path: str, *patterns: str) -> Path:
    """`path`, or the folder that the hub model's files matching the patterns are downloaded to."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=list(patterns)))


def copy_configuration(model: ModelConfig, folder: Path, published: bool = False) -> None:
    """Copy the model's configuration and tokenizer to `folder`, for weights in `model.dtype`: the text model's, or if
    `published` the whole model's, with MTP and vision."""
    source = local_folder(model.hf_path, *_COPIED)
    for path in (path for pattern in _COPIED for path in source.glob(pattern)):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    config = config if published else text_settings(config)
    if config.get("model_type") == "kimi_k2":  # which transformers does not know
        config["model_type"] = "deepseek_v3"
    if config.get("model_type") == "deepseek_v3":  # where transformers assumes these, vLLM assumes a softmax
        for name, value in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
            config.setdefault(name, value)
    has_mtp = config.get("model_type") in ("deepseek_v3", "glm4_moe") or any(name in config for name in _MTP_LAYERS)
    # `torch_dtype` is an older name of `dtype`; the programs in auto_map are not copied.
    for name in ("torch_dtype", "quantization_config", "auto_map", *(() if published else _MTP_LAYERS)):
        config.pop(name, None)
    config["dtype"] = config.get("text_config", {})["dtype"] = model.dtype
    if has_mtp and not published:
        config[_MTP_LAYERS[0]] = 0  # transformers defaults to 1
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def listed(names: list[str]) -> str:
    """The tensors' names for a message; of more than three, the first three and the count."""
    shown = ", ".join(names[:3])
    return f"{len(names)} tensors, among them {shown}" if len(names) > 3 else f"the tensor(s) {shown}"


Place = tuple[str, Any]
"""A tensor of the files, and the index of a weight in it: all of it, or an expert and its rows."""


def as_stored(places: Mapping[str, Place], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights by their names in the files; experts that are one tensor there are joined when the last one comes."""
    counts = Counter(stored for stored, _ in places.values())
    joined: dict[str, dict[tuple[int, int], Tensor]] = {}
    for name, tensor in tensors:
        stored, index = places[name]
        if index is ...:
            yield stored, tensor
            continue
        parts = joined.setdefault(stored, {})
        parts[index[0], index[1].start] = tensor
        if len(parts) == counts[stored]:
            rows = [part for _, part in sorted(joined.pop(stored).items())]
            yield stored, torch.cat(rows).unflatten(0, (1 + max(parts)[0], -1))


@dataclass(frozen=True)
class PublishedForm:
    """Tensors of a folder besides the model's own weights.

    Attributes:
        with_images: the text model's names in the files have a prefix.
        not_text: prefixes of the names of MTP's and vision's tensors.
        block: rows and columns of an FP8 weight that share a scale; None if config.json has no FP8.
        experts: number of experts of a layer that may be one tensor in the files.
        expert_size: rows of an expert's gate.
    """

    path: str
    with_images: bool
    not_text: tuple[str, ...]
    block: tuple[int, int] | None
    experts: int
    expert_size: int

    @staticmethod
    def from_config(config: Any, path: str) -> PublishedForm:
        """Read the form from transformers' configuration, and remove it there.

        Raises:
            UserError: the weights are quantized in another way.
        """
        from transformers import PretrainedConfig

        with_images = PretrainedConfig.get_config_dict(path)[0].get("model_type") in WITH_IMAGES
        first, count = config.num_hidden_layers, getattr(config, _MTP_LAYERS[0], 0) or 0
        if count:
            setattr(config, _MTP_LAYERS[0], 0)
        block = None
        if getattr(config, "quantization_config", None):
            block = _block_of(config.quantization_config, path)
            del config.quantization_config
        not_text = [f"model.layers.{first + i}." for i in range(count)]
        not_text += ["mtp."] if hasattr(config, "linear_num_value_heads") else []  # Qwen3-Next and 3.5
        not_text += [VISION] if with_images else []
        experts, size = (getattr(config, name, None) or 0 for name in ("num_experts", "moe_intermediate_size"))
        return PublishedForm(path, with_images, tuple(not_text), block, experts, size)

    def places(self, stored: Iterable[str]) -> dict[str, Place]:
        """Names as a text model has them, with each expert apart -> places in the files, whose tensors are `stored`.

        Raises:
            UserError: two tensors have the same weight.
        """
        places: dict[str, Place] = {}
        for tensor in stored:
            for name, index in self._weights_in(tensor):
                if name in places:
                    raise UserError(
                        f"model.hf_path={self.path} has {name} twice, in {places[name][0]} and {tensor}; remove one"
                    )
                places[name] = tensor, index
        return places

    def _weights_in(self, tensor: str) -> Iterator[tuple[str, Any]]:
        """Names of a stored tensor's weights and their indices in it."""
        name, size = tensor.replace(_TEXT, "model.", 1) if self.with_images else tensor, self.expert_size
        layer, _, experts = name.partition(".mlp.experts.")
        is_packed = self.experts and experts in ("gate_up_proj", "down_proj")
        if not is_packed or name.startswith(self.not_text):
            yield name, ...
            return
        gates = {"gate": slice(0, size), "up": slice(size, None)}
        for part, rows in gates.items() if experts == "gate_up_proj" else [("down", slice(0, None))]:
            for i in range(self.experts):
                yield f"{layer}.mlp.experts.{i}.{part}_proj.weight", (i, rows)

    def weights(self, names: Iterable[str]) -> list[str]:
        """The names of the text model's weights, without scales."""
        return sorted(name for name in _without_scales(names) if not name.startswith(self.not_text))

    def kept(self, names: Iterable[str]) -> list[str]:
        """The names of MTP's and vision's tensors, without scales."""
        return sorted(name for name in _without_scales(names) if name.startswith(self.not_text))

    def shapes(self, stored: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's weights; `stored` maps every tensor of the files to its shape and safetensors' dtype.

        Raises:
            UserError: an FP8 weight and its scales do not fit together.
        """
        whole = {name: torch.empty(shape, device="meta") for name, (shape, _) in stored.items()}
        stored = {
            name: (tuple(whole[tensor][index].shape), stored[tensor][1])
            for name, (tensor, index) in self.places(stored).items()
            if index is ... or whole[tensor].shape[:-2] == (self.experts,)
        }
        weights = self.weights(stored)
        in_fp8 = [name for name in weights if stored[name][1] in _STORED_FP8]
        if in_fp8 and self.block is None:
            raise UserError(
                f"model.hf_path={self.path} has {listed(in_fp8)} in FP8, and its config.json has no "
                "quantization_config with the blocks of their scales; use the config.json they came with"
            )
        if missing := [name + SCALE for name in in_fp8 if name + SCALE not in stored]:
            raise UserError(
                f"model.hf_path={self.path} lacks {listed(missing)}, the scales of weights in FP8; "
                "download its files again"
            )
        for name in in_fp8:
            shape, scales = stored[name][0], stored[name + SCALE][0]
            expected = tuple(-(-size // edge) for size, edge in zip(shape, self.block or (), strict=False))
            if len(shape) != 2 or scales != expected:
                raise UserError(
                    f"model.hf_path={self.path}: {name} in FP8 has the shape {shape} and its scales {scales}, "
                    f"not {expected} as blocks of {self.block} have; download its files again"
                )
        # Scales of a weight that is not in FP8 are left over: they may not have been applied.
        unapplied = {name + SCALE for name in weights} & stored.keys() - {name + SCALE for name in in_fp8}
        return {name: stored[name][0] for name in (*weights, *unapplied)}

    def plain(self, weight: Tensor, scale: Tensor) -> Tensor:
        """A weight in FP8 as float32, multiplied by its scales."""
        assert self.block is not None
        rows, columns = self.block
        whole = weight.float()
        for i, scales in enumerate(scale.float()):
            whole[i * rows : (i + 1) * rows] *= scales.repeat_interleave(columns)[: whole.shape[1]]
        return whole


def _without_scales(names: Iterable[str]) -> set[str]:
    present = set(names)
    return {name for name in present if not (name.endswith(SCALE) and name.removesuffix(SCALE) in present)}


def _block_of(quantization: Any, path: str) -> tuple[int, int]:
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method, block = fields.get("quant_method"), fields.get("weight_block_size")
    if method != "fp8" or not (isinstance(block, list | tuple) and len(block) == 2):
        raise UserError(
            f"model.hf_path={path} has weights quantized by quant_method={method}, weight_block_size={block}; only "
            "fp8 with blocks of two dimensions is read: name the model's folder in bfloat16"
        )
    return int(block[0]), int(block[1])
