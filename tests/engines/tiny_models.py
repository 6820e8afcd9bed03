"""Tiny random models as Hugging Face folders, one of each supported kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from megatron_aspo.tools.planning.architectures import PUBLIC

VOCAB = 131
"""Vocabulary size, not a multiple of any tensor-parallel size."""

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

_PARTIAL_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_SIGMOID = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "num_nextn_predict_layers": 0,
}
"""Experts chosen by sigmoids, a shared one, and a first layer without any."""

_DELTA_NET = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SHARED = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}

_KIMI_ROPE = _YARN_ROPE | {"beta_fast": 1.0}

# name -> (class of transformers, additional fields of its configuration)
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
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": 64}),
    "glm4-moe": ("Glm4Moe", {"head_dim": 16, "attention_bias": True, "use_qk_norm": True, **_PARTIAL_ROPE, **_SIGMOID}),
    "glm4-moe-lite": ("Glm4MoeLite", {**_LATENT, **_SIGMOID, "mlp_layer_types": ["dense", "sparse"]}),
    "deepseek-v3": (
        "DeepseekV3",
        {**_LATENT, **_SIGMOID, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "rope_parameters": _YARN_ROPE},
    ),
    # Published with this name, more experts than a byte can number, and no groups of them.
    "kimi-k2": (
        "DeepseekV3",
        {**_LATENT, **_SIGMOID, "n_routed_experts": 12, "num_experts_per_tok": 4, "rope_parameters": _KIMI_ROPE},
    ),
    "qwen3-next": ("Qwen3Next", {**_DELTA_NET, **_SHARED}),
    "qwen3.5": ("Qwen3_5Text", _DELTA_NET),
    "qwen3.5-moe": ("Qwen3_5MoeText", {**_DELTA_NET, **_SHARED}),
}


def write_model(name: str, folder: Path, **changed: Any) -> Path:
    """Write model `name` of MODELS with no tensor at its usual initial value; `changed` replaces configuration
    fields. The weights are always the same. With one seed in a hundred, rounding would send a token to another
    expert, or change its log-prob by more than the tests allow."""
    import transformers

    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**_SHAPE, **fields, **changed})
    with torch.random.fork_rng([]):
        torch.manual_seed(2)  # with this seed, every token of the tests is at least 6e-5 away from another expert
        model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        for buffer in (x for x_name, x in model.named_buffers() if "correction_bias" in x_name):
            buffer += 0.05 * torch.randn(buffer.shape, generator=generator)
    model.save_pretrained(folder)
    if name == "kimi-k2":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "kimi_k2"}))
    return folder


def write_published(folder: Path, meant: Path, block: int = 16, **changed: Any) -> Path:
    """Write model deepseek-v3 to `folder` in DeepSeek's published format, and to `meant` the weights that it
    encodes, in float32. Linear weights are in FP8 with a scale for each block, other tensors in bfloat16, the
    router's bias in float32. There is an MTP layer, and some scales are in another file than their weights."""
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

    tiny, large = json.loads((meant / "config.json").read_text()), PUBLIC["deepseek-ai/DeepSeek-V3"]
    config = {name: tiny.get(name, value) for name, value in large.items()}
    rope = tiny["rope_parameters"]
    config |= {
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "num_nextn_predict_layers": large["num_nextn_predict_layers"],
        "quantization_config": large["quantization_config"] | {"weight_block_size": [block, block]},
        "rope_scaling": {name: rope[name] for name in large["rope_scaling"] if name != "type"} | {"type": "yarn"},
        "rope_theta": rope["rope_theta"],
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


_MROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_VISION = {
    **{"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4},
    "num_position_embeddings": 16,
}


def write_with_vision(name: str, folder: Path, **changed: Any) -> Path:
    """Write "qwen3.5", "qwen3.5-moe" or "qwen3.6-moe" as published: with a vision encoder, the text model under a
    prefix, all experts of a layer in one tensor, and an MTP layer, whose experts are apart in Qwen3.5 and in one tensor
    in Qwen3.6. Text is in float32, the rest in another file in bfloat16. `changed` replaces fields of
    the text model."""
    import transformers

    kind = {"qwen3.5": "Qwen3_5", "qwen3.5-moe": "Qwen3_5Moe", "qwen3.6-moe": "Qwen3_5Moe"}[name]
    rope = {"rope_parameters": _MROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}}
    text = {**_SHAPE, **MODELS[name.replace("3.6", "3.5")][1], **rope, "mtp_num_hidden_layers": 1, **changed}
    vision = _VISION | {"out_hidden_size": text["hidden_size"]}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    with torch.random.fork_rng([]):
        torch.manual_seed(2)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        stored = {key: x + 0.2 * torch.randn(x.shape) for key, x in model.state_dict().items()}
    layer = "model.language_model.layers.1."
    mtp = {key.replace(layer, "mtp.layers.0."): x.clone() for key, x in stored.items() if layer in key}
    for key in [key for key in mtp if "mlp.experts." in key and name == "qwen3.5-moe"]:
        experts = mtp.pop(key)
        mtp |= {key.replace("experts.", f"experts.{i}."): x.clone() for i, x in enumerate(experts)}
    mtp["mtp.fc.weight"] = torch.ones(text["hidden_size"], 2 * text["hidden_size"])
    mtp |= {key: stored.pop(key) for key in [key for key in stored if ".visual." in key]}
    folder.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    files = {f"model-0000{i}-of-00002.safetensors": tensors for i, tensors in enumerate((stored, mtp), 1)}
    for file, tensors in files.items():
        dtype = torch.float32 if tensors is stored else torch.bfloat16
        save_file({key: x.to(dtype) for key, x in tensors.items()}, folder / file, {"format": "pt"})
    weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_tokenizer(folder)
    for path in folder.glob("tokenizer*.json"):  # transformers adds this token to a tokenizer of Qwen's that lacks it
        path.write_text(path.read_text().replace("<s>", "<|endoftext|>"))
    return folder


def _in_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in FP8, the scales of its blocks, and the product of the two."""
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
    """Copy a published model with changed tensors and config.json fields; the value None removes one."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    for file in folder.glob("*.safetensors"):
        found = {name: tensors.get(name, tensor) for name, tensor in load_file(file).items()}
        save_file({name: x for name, x in found.items() if x is not None}, file, {"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of ASCII characters with a chat template; `</s>` ends a sequence."""
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
