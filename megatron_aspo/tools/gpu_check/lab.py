"""Parts that checks share: small models, policies, samples, measured memory, and ranks of a check."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_aspo.batch import MicroBatch, Prompt, Sample
from megatron_aspo.config.fp8 import device_recipes
from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import OptimizerConfig, TrainConfig
from megatron_aspo.errors import RunError
from megatron_aspo.ranks.launch import compute_capability, rank_environment, run_local
from megatron_aspo.tools.gpu_check.records import Lab, Numbers

if TYPE_CHECKING:
    from megatron_aspo.policy.trainer import Policy

_COMMON = {"num_hidden_layers": 4, "hidden_size": 1024, "num_attention_heads": 16, "tie_word_embeddings": False}
_QWEN = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "intermediate_size": 3072}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
_YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
MODELS: dict[str, dict[str, Any]] = {
    "D": {"model_type": "qwen3", **_COMMON, **_QWEN},
    "M": {
        **{"model_type": "qwen3_moe", "num_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        **{"norm_topk_prob": True, **_COMMON, **_QWEN},
    },
    "L": {
        **{"model_type": "deepseek_v3", **_COMMON, "num_key_value_heads": 16, "vocab_size": 129280},
        **{"intermediate_size": 3072, "q_lora_rank": 512, "kv_lora_rank": 512, "qk_nope_head_dim": 128},
        **{"qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 1, "n_routed_experts": 16},
        **{"n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
        **{"moe_intermediate_size": 512, "num_nextn_predict_layers": 0, "rope_parameters": _YARN},
    },
}
"""Fields of config.json: dense, with experts, with latent attention and experts."""
_DIVIDED = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
LONGEST = 4096
"""Tokens of a stream and of the longest sample; 64 on a CPU."""


def longest(lab: Lab) -> int:
    return 64 if lab.small else LONGEST


def model_folder(lab: Lab, name: str) -> Path:
    """The Hugging Face folder of a model with random weights, made by the first check that needs it."""
    folder = lab.path / f"model-{name}"
    if not folder.exists():
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = MODELS[name] | {"max_position_embeddings": LONGEST, "initializer_range": 0.05}
        if lab.small:
            divided = {name: fields[name] // 32 for name in _DIVIDED if name in fields}
            fields |= divided | {"num_hidden_layers": 2, "vocab_size": 131, "initializer_range": 0.3}
            fields |= {"head_dim": 32} if "head_dim" in fields else {"qk_nope_head_dim": 16, "v_head_dim": 16}
        write_model(lab, AutoConfig.for_model(**fields), AutoModelForCausalLM, folder)
    return folder


def write_model(lab: Lab, config: Any, kind: Any, folder: Path) -> None:
    """Draw weights on the device, and publish the folder at once: checks beside this one may write it too."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    torch.manual_seed(0)
    with torch.device(lab.device):
        model = kind.from_config(config, dtype=torch.float32 if lab.small else torch.bfloat16)
    model.save_pretrained(partial)
    del model
    torch.cuda.empty_cache()  # the ranks of this check need its first GPU
    with contextlib.suppress(OSError):  # another check was first
        partial.rename(folder)


def run_config(lab: Lab, model: str = "D", **sections: Any) -> RunConfig:
    """Configuration of a model of `MODELS`; on a bare machine of one that needs no Hugging Face files."""
    dtype: Any = "float32" if lab.small else "bfloat16"
    shape: dict[str, Any] = {"dtype": dtype, "max_sequence_length": longest(lab)}
    if not lab.bare:
        shape["hf_path"] = str(model_folder(lab, model))
    elif not lab.small:
        shape |= {"num_layers": 4, "hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 8}
        shape |= {"ffn_hidden_size": 6144}
    defaults: dict[str, Any] = {
        "model": ModelConfig(**shape),
        "rollout": RolloutConfig(max_response_tokens=longest(lab) // 2),
        "optimizer": OptimizerConfig(lr=1e-3, lr_warmup_updates=0),
        "train": TrainConfig(max_tokens_per_micro_batch=longest(lab), log_samples=0),
    }
    return replace(RunConfig(name="check", output_dir=str(lab.path)), **(defaults | sections))


def vocab_size(lab: Lab, config: RunConfig) -> int:
    """Tokens of the model."""
    if not config.model.hf_path:
        return 128 if lab.small else 32768
    return int(json.loads((Path(config.model.hf_path) / "config.json").read_text())["vocab_size"])


@contextlib.contextmanager
def open_policy(lab: Lab, config: RunConfig) -> Iterator[Policy]:
    """A policy among the ranks of this check, with fresh process groups."""
    from megatron_aspo.policy.cpu import cuda

    cuda.import_megatron()
    gc.collect()  # an earlier policy of this process
    from megatron.core import parallel_state

    from megatron_aspo.policy.trainer import Policy
    from megatron_aspo.ranks.process_group import distributed

    with distributed(config):
        try:
            yield Policy(config, vocab_size(lab, config))
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_global_memory_buffer()
            if engine := sys.modules.get("transformer_engine.pytorch"):
                engine.quantization.FP8GlobalStateManager.reset()  # the next policy's amaxes would join these


def make_samples(lab: Lab, config: RunConfig, count: int, seed: int = 0, length: int = 0) -> list[Sample]:
    """Samples of random tokens and lengths, or of `length` tokens each."""
    rng, vocabulary, half = np.random.default_rng(seed), vocab_size(lab, config), longest(lab) // 4
    samples: list[Sample] = []
    for i in range(count):
        prompt, response = (length // 2, length - length // 2) if length else rng.integers(2, half, 2).tolist()
        tokens = [rng.integers(vocabulary, size=size, dtype=np.int32) for size in (prompt, response)]
        first = Prompt(i, "", tuple(tokens[0].tolist()), {})
        samples.append(Sample(first, i // 4, tokens[1], "stop", advantage=float(rng.normal())))
    return samples


def fp8_recipes(lab: Lab) -> list[str]:
    """FP8 recipes of this GPU."""
    if lab.device == "cpu":
        return []
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return list(device_recipes(torch.cuda.get_device_capability(), (int(major), int(minor))))


def set_old_logprobs(policy: Policy, batches: Sequence[MicroBatch]) -> None:
    for batch, logprobs in zip(batches, policy.logprobs(batches), strict=False):  # none before the last stage
        batch.old_logprobs = logprobs


def take_update(policy: Policy, batches: list[MicroBatch]) -> Numbers:
    """One update; its metrics."""
    from megatron_aspo.policy.metrics import UpdateMetrics

    metrics = UpdateMetrics()
    policy.train_step(batches, policy.config.loss, metrics)
    return metrics.reduce()


class Memory:
    """Bytes on the device: live ones, and the peak since `reset`. On a CPU those of all tensors, and no peak."""

    def __init__(self, lab: Lab) -> None:
        self._on_gpu = lab.device == "cuda"

    @property
    def live(self) -> int:
        gc.collect()
        if self._on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._on_gpu else self.live

    def reset(self) -> int:
        """Forget the peak; return the live bytes."""
        live = self.live  # garbage goes first: it is no part of the next peak
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        return live


def on_ranks(lab: Lab, target: str, config: RunConfig, ranks: int) -> Numbers:
    """Numbers of rank 0 of a function that `ranks` ranks run together.

    Raises:
        RunError: a rank fails.
    """
    result = lab.path / f"ranks-{os.getpid()}.json"
    environment = rank_environment(config.parallel, compute_capability() if lab.device == "cuda" else None)
    arguments = [target, json.dumps(asdict(lab)), str(result)]
    if code := run_local("megatron_aspo.tools.gpu_check.child", arguments, ranks, environment=environment):
        raise RunError(f"a rank of {target} ended with {code}")
    return json.loads(result.read_text())


def run_command(*words: str) -> None:
    """Run `python -m megatron_aspo WORDS`. Raises RunError if it fails."""
    if code := subprocess.run([sys.executable, "-m", "megatron_aspo", *words]).returncode:
        raise RunError(f"{' '.join(words[:2])} ended with {code}")
