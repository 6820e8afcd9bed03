"""A model's folder in Hugging Face's format, as it is published: what in it are the model's own weights.

DeepSeek-V3 and its kind are published with more than that. Weights of linear layers are in FP8, block by block with a
scale of its own (the tensor `<weight>_scale_inv`), and behind the last layer come others that predict further tokens
(MTP). Here weights are read in full precision and MTP is left out: it is neither trained nor sampled with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_aspo.config import ModelConfig
from megatron_aspo.errors import UserError

SCALE = "_scale_inv"
"""Behind the name of a weight in FP8, the name of its scales: a block's weights are its FP8 numbers times its scale."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_STORED_FP8 = ("F8_E4M3", "F8_E5M2")  # the names that safetensors has for them
_MTP_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")  # DeepSeek's name and transformers'
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer, but no index of weights


def local_folder(path: str, *patterns: str) -> Path:
    """`path`, or where files of the hub's model that match the patterns have been downloaded to."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=list(patterns)))


def copy_configuration(model: ModelConfig, folder: Path) -> None:
    """Configuration and tokenizer of the model, to `folder`: that of weights in `model.dtype`, without MTP."""
    source = local_folder(model.hf_path, *_COPIED)
    for path in (path for pattern in _COPIED for path in source.glob(pattern)):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    has_mtp = config.get("model_type") == "deepseek_v3" or any(name in config for name in _MTP_LAYERS)
    # `torch_dtype` is the name that `dtype` had; the programs that an auto_map names are not copied.
    for name in ("torch_dtype", "quantization_config", "auto_map", *_MTP_LAYERS):
        config.pop(name, None)
    config |= {"dtype": model.dtype} | ({_MTP_LAYERS[0]: 0} if has_mtp else {})  # without it transformers takes 1
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def listed(names: list[str]) -> str:
    """The tensors' names for a message, or the first three and how many."""
    shown = ", ".join(names[:3])
    return f"{len(names)} tensors, among them {shown}" if len(names) > 3 else f"the tensor(s) {shown}"


@dataclass(frozen=True)
class PublishedForm:
    """What a folder has besides the model's own weights.

    Attributes:
        mtp: beginnings of the names of MTP's tensors.
        block: rows and columns of an FP8 weight that share a scale; None if config.json speaks of no FP8.
    """

    path: str
    mtp: tuple[str, ...]
    block: tuple[int, int] | None

    @staticmethod
    def take_from(config: Any, path: str) -> PublishedForm:
        """What transformers' configuration says of it, which then says nothing of it any more.

        Raises:
            UserError: the weights are quantized in another way.
        """
        first, count = config.num_hidden_layers, getattr(config, _MTP_LAYERS[0], 0) or 0
        if count:
            setattr(config, _MTP_LAYERS[0], 0)
        block = None
        if getattr(config, "quantization_config", None):
            block = _block_of(config.quantization_config, path)
            del config.quantization_config
        return PublishedForm(path, tuple(f"model.layers.{first + i}." for i in range(count)), block)

    def weights(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are neither scales nor MTP's."""
        found = set(names)
        return sorted(
            name
            for name in found
            if not name.startswith(self.mtp) and not (name.endswith(SCALE) and name.removesuffix(SCALE) in found)
        )

    def shapes(self, stored: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's weights; `stored` has the shape and safetensors' dtype of every tensor of the files.

        Raises:
            UserError: an FP8 weight and its scales do not fit together.
        """
        weights = self.weights(stored)
        in_fp8 = [name for name in weights if stored[name][1] in _STORED_FP8]
        if in_fp8 and self.block is None:
            raise UserError(
                f"model.hf_path={self.path} has {listed(in_fp8)} in FP8, and its config.json has no "
                "quantization_config that tells the blocks of their scales; take the config.json they came with"
            )
        if missing := [name + SCALE for name in in_fp8 if name + SCALE not in stored]:
            raise UserError(
                f"model.hf_path={self.path} lacks {listed(missing)}, without which weights in FP8 mean nothing; "
                "download its files again"
            )
        for name in in_fp8:
            assert self.block is not None
            shape, found = stored[name][0], stored[name + SCALE][0]
            expected = tuple(-(-size // of) for size, of in zip(shape, self.block, strict=False))
            if len(shape) != 2 or found != expected:
                raise UserError(
                    f"model.hf_path={self.path}: {name} in FP8 has the shape {shape} and its scales {found}, "
                    f"not {expected} as blocks of {self.block[0]} x {self.block[1]} have; download its files again"
                )
        # Scales of a weight that is not in FP8 are left over: somebody may have forgotten to apply them.
        unapplied = {name + SCALE for name in weights} & stored.keys() - {name + SCALE for name in in_fp8}
        return {name: stored[name][0] for name in (*weights, *unapplied)}

    def plain(self, weight: Tensor, scale: Tensor) -> Tensor:
        """A weight in FP8 as the float32 numbers that it stands for."""
        assert self.block is not None
        rows, columns = self.block
        whole = weight.float()
        for i, scales in enumerate(scale.float()):
            whole[i * rows : (i + 1) * rows] *= scales.repeat_interleave(columns)[: whole.shape[1]]
        return whole


def _block_of(quantization: Any, path: str) -> tuple[int, int]:
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method, block = fields.get("quant_method"), fields.get("weight_block_size")
    if method != "fp8" or not (isinstance(block, list | tuple) and len(block) == 2):
        raise UserError(
            f"model.hf_path={path} has weights quantized by quant_method={method}, weight_block_size={block}; only "
            "fp8 with blocks of two dimensions is read: name the model's folder in bfloat16"
        )
    return int(block[0]), int(block[1])
