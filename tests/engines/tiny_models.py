"""Tiny random models as Hugging Face folders, one of each kind that is supported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from megatron_aspo.planning.architectures import PUBLIC

VOCAB = 131
"""No multiple of any tensor-parallel size."""

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}

# name -> (class of transformers, what its configuration has besides)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 24,
            "num_nextn_predict_layers": 0,
            "rope_parameters": _YARN_ROPE,
        },
    ),
}


def write_model(name: str, folder: Path, **changed: Any) -> Path:
    """Model `name` of MODELS, no tensor of it at its usual initial value; `changed` replaces configuration fields.
    The same weights each time: of others, one set in a hundred has a token that rounding sends to another expert, or
    whose log-prob it moves by more than tests allow."""
    import transformers

    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**_SHAPE, **fields, **changed})
    with torch.random.fork_rng([]):
        torch.manual_seed(2)  # with it, no token of the tests is nearer than 6e-5 to another expert
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def write_published(folder: Path, meant: Path, block: int = 16, **changed: Any) -> Path:
    """Model deepseek-v3 in `folder` as DeepSeek publishes such a model; `meant` has the weights that it stands for in
    float32. Linear weights are in FP8 with a scale for each block, other tensors in bfloat16, the router's bias in
    float32; there is a layer for MTP; some scales are not in the file of their weights."""
    write_model("deepseek-v3", meant, **changed)
    generator = torch.Generator().manual_seed(2)
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(meant / "model.safetensors").items():
        if "_proj" in name:
            stored[name], stored[f"{name}_scale_inv"], plain[name] = _in_blocks(tensor, block)
        elif name.endswith("e_score_correction_bias"):
            stored[name] = plain[name] = 0.05 * torch.randn(tensor.shape, generator=generator)
        else:
            stored[name] = tensor.bfloat16()
            plain[name] = stored[name].float()
    save_file(plain, meant / "model.safetensors", {"format": "pt"})

    mtp = "model.layers.2."
    second = {name.replace("model.layers.1.", mtp): x.clone() for name, x in stored.items() if "layers.1." in name}
    size, embedding = plain["model.norm.weight"].numel(), stored["model.embed_tokens.weight"]
    second |= {f"{mtp}{name}.weight": torch.ones(size).bfloat16() for name in ("enorm", "hnorm", "shared_head.norm")}
    second |= {f"{mtp}{name}.weight": embedding.clone() for name in ("embed_tokens", "shared_head.head")}
    second[f"{mtp}eh_proj.weight"] = torch.ones(size, 2 * size).bfloat16()
    second |= {name: stored.pop(name) for name in list(stored) if "layers.1." in name and name.endswith("_scale_inv")}
    folder.mkdir()
    files = {f"model-0000{i}-of-00002.safetensors": tensors for i, tensors in enumerate((stored, second), 1)}
    for name, tensors in files.items():
        save_file(tensors, folder / name, {"format": "pt"})
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    ours, theirs = json.loads((meant / "config.json").read_text()), PUBLIC["deepseek-ai/DeepSeek-V3"]
    config = {name: ours.get(name, value) for name, value in theirs.items()}
    rope = ours["rope_parameters"]
    config |= {
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "num_nextn_predict_layers": theirs["num_nextn_predict_layers"],
        "quantization_config": theirs["quantization_config"] | {"weight_block_size": [block, block]},
        "rope_scaling": {name: rope[name] for name in theirs["rope_scaling"] if name != "type"} | {"type": "yarn"},
        "rope_theta": rope["rope_theta"],
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _in_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in FP8, the scales of its blocks, and what the two stand for."""
    rows, columns = weight.shape
    padded = functional.pad(weight, (0, -columns % block, 0, -rows % block))
    blocks = padded.reshape(padded.shape[0] // block, block, -1, block)
    scales = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    fp8 = (blocks / scales).to(torch.float8_e4m3fn)
    stored, meant = (x.reshape(padded.shape)[:rows, :columns].contiguous() for x in (fp8, fp8.float() * scales))
    return stored, scales[:, 0, :, 0].contiguous(), meant


def change_published(
    source: Path, folder: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None
) -> Path:
    """A copy of a published model with other tensors, None for none, and fields of config.json, None for none."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    for file in folder.glob("*.safetensors"):
        found = {name: tensors.get(name, tensor) for name, tensor in load_file(file).items()}
        save_file({name: x for name, x in found.items() if x is not None}, file, {"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of ASCII characters with a chat template; `</s>` ends a sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(code): code for code in range(128)} | {"<s>": 128, "</s>": 129, "<user>": 130}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<user>"]
    )
    fast.chat_template = "{{ bos_token }}{% for m in messages %}<user>{{ m['content'] }}{% endfor %}>"
    fast.save_pretrained(folder)
