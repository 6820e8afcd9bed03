"""What several sections of a configuration must agree on; imports neither torch nor Megatron."""

from __future__ import annotations

import importlib.util
import math
import typing
from collections.abc import Mapping

from megatron_aspo.config import Objective, ParallelConfig, RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.fp8 import check_fp8_layout


def check_together(config: RunConfig) -> None:
    """Raise UserError for the first thing in which sections contradict each other."""
    model, parallel, rollout, train = config.model, config.parallel, config.rollout, config.train
    if not model.hf_path:
        sizes = {what: getattr(model, what) or 0 for what in _LAID_OUT}
        check_layout(sizes, parallel, "model.")
        check_router_replay(config, model.num_experts)
        head = model.hidden_size // model.num_attention_heads
        shape = sizes | {"hidden_size": model.hidden_size, "kv_channels": head}
        check_fp8_layout(shape | {"moe_ffn_hidden_size": model.expert_hidden_size}, config.fp8, parallel, "model.")
    if config.fp8.recipe is not None and not config.fp8.emulate:
        _check_fp8_run(config)
    if rollout.quantization == "fp8" and model.dtype != "bfloat16":
        raise UserError("rollout.quantization=fp8 needs model.dtype=bfloat16; set it, or rollout.quantization=none")
    if config.fp8.recipe == "delayed" and config.fp8.emulate and model.num_experts:
        raise UserError("fp8.recipe=delayed is not emulated for experts; take another recipe")
    if config.data.chat_template and not model.hf_path:
        raise UserError(
            "data.chat_template=true needs a tokenizer with a chat template, and the character tokenizer has none; "
            "set model.hf_path or data.chat_template=false"
        )
    if config.reward.overlong_buffer > rollout.max_response_tokens:
        raise UserError(
            f"reward.overlong_buffer={config.reward.overlong_buffer} exceeds rollout.max_response_tokens="
            f"{rollout.max_response_tokens}; lower it"
        )
    if config.optimizer.cpu_offload and model.dtype != "bfloat16":
        raise UserError(
            f"optimizer.cpu_offload={config.optimizer.cpu_offload} is for model.dtype=bfloat16; set one or the other"
        )
    if rollout.engine == "megatron" and parallel.expert_tensor_size != parallel.tensor:
        raise UserError(
            f"rollout.engine=megatron samples with the experts parted as the rest; remove "
            f"parallel.expert_tensor={parallel.expert_tensor}, or set rollout.engine=vllm"
        )
    if rollout.engine == "vllm" and model.num_experts:
        raise UserError(
            f"rollout.engine=vllm takes model.num_experts={model.num_experts} from model.hf_path only; name one, or "
            "set rollout.engine=megatron"
        )
    if train.mini_batch_prompts > rollout.prompts_per_step:
        raise UserError(
            f"train.mini_batch_prompts={train.mini_batch_prompts} exceeds "
            f"rollout.prompts_per_step={rollout.prompts_per_step}; lower the first or raise the second"
        )
    if rollout.max_response_tokens >= model.max_sequence_length:
        raise UserError(
            f"rollout.max_response_tokens={rollout.max_response_tokens} leaves no room for a prompt in "
            f"model.max_sequence_length={model.max_sequence_length}; lower the first or raise the second"
        )
    longest = math.ceil(model.max_sequence_length / config.stream_multiple) * config.stream_multiple
    if train.max_tokens_per_micro_batch < longest:
        raise UserError(
            f"train.max_tokens_per_micro_batch={train.max_tokens_per_micro_batch} is less than {longest}, where "
            f"a sample of model.max_sequence_length={model.max_sequence_length} tokens fits; raise it"
        )


def _check_fp8_run(config: RunConfig) -> None:
    """What FP8 on a GPU asks of the other sections."""
    if config.model.dtype != "bfloat16":
        raise UserError(f"fp8.recipe={config.fp8.recipe} needs model.dtype=bfloat16; set it, or fp8.emulate=true")
    if config.rollout.engine == "megatron":
        raise UserError(
            f"rollout.engine=megatron decodes as many tokens as there are responses, which fp8.recipe="
            f"{config.fp8.recipe} does not take; set rollout.engine=vllm"
        )


def config_warnings(config: RunConfig) -> list[str]:
    """What is allowed but probably not meant, a line each."""
    warnings: list[str] = []
    if config.updates_per_step == 1 and config.loss.objective in typing.get_args(Objective):
        warnings.append(
            f"{config.loss.objective.upper()} is inert: one optimizer update per rollout batch, so every "
            "importance ratio is 1 and all objectives have the same gradient; lower "
            "train.mini_batch_prompts or raise train.epochs"
        )
    if config.fp8.recipe == "delayed":
        warnings.append(
            "fp8.recipe=delayed scales by earlier passes: old log-probs and the update's passes differ, and the first "
            "importance ratios are not 1; current, blockwise and mxfp8 reproduce them"
        )
    for name, value, off in (("top_p", config.rollout.top_p, 1), ("top_k", config.rollout.top_k, 0)):
        if value != off:
            warnings.append(
                f"rollout.{name}={value} truncates the sampler's distribution, the trainer's "
                "log-probs are of the whole one: the importance ratio then corrects for the wrong policy; "
                f"{name}={off} is exact"
            )
    if config.rollout.max_staleness and config.loss.rollout_correction == "none":
        warnings.append(
            f"rollout.max_staleness={config.rollout.max_staleness} trains on responses of older weights as if the "
            "current ones had written them (loss.rollout_correction=none); truncate or mask weights them by "
            "pi_old / pi_rollout"
        )
    return warnings


HUGGING_FACE = ("transformers==5.19.0", "safetensors==0.8.0", "hydra-core==1.3.8", "einops==0.8.2")
MEGATRON_BRIDGE = "megatron-bridge==0.6.2"
"""With HUGGING_FACE what `model.hf_path` needs; of what Megatron-Bridge itself asks for pip finds no set that fits."""


def check_installed() -> None:
    """Raise UserError where the package was installed without its dependencies, for the loss alone."""
    if importlib.util.find_spec("omegaconf") is None:
        raise UserError(
            "the command line needs the package's dependencies, which are not installed; install it again without "
            "--no-deps, or in a checkout by make install (megatron_aspo.loss needs torch alone)"
        )


def check_hugging_face() -> None:
    """Raise UserError unless what reads Hugging Face models is installed."""
    modules = ("transformers", "safetensors", "hydra", "einops", "megatron.bridge")
    missing = [name for name in modules if not _is_there(name)]
    if missing:
        raise UserError(
            f"model.hf_path needs {', '.join(missing)}, not installed; run make install in a checkout, or "
            f"pip install {' '.join(HUGGING_FACE)} && pip install --no-deps {MEGATRON_BRIDGE}"
        )


def _is_there(module: str) -> bool:
    package = module.partition(".")[0]
    return all(importlib.util.find_spec(name) is not None for name in dict.fromkeys((package, module)))


def check_world_size(config: RunConfig, world_size: int) -> None:
    """Raise UserError unless `world_size` ranks, `rollout.ranks` included, can hold the configured layout."""
    size, apart = config.parallel.model_parallel_size, config.rollout.ranks
    training = world_size - apart
    if apart and training < 1:
        raise UserError(
            f"{world_size} rank(s) are too few for rollout.ranks={apart} that only generate and {size} that train; "
            f"start {apart} ranks more than a multiple of {size}"
        )
    if training % size:
        what, start = f"{world_size} rank(s)", f"a multiple of {size} ranks"
        if apart:
            what = f"{training} training rank(s) ({world_size} less rollout.ranks={apart})"
            start = f"{apart} ranks more than a multiple of {size}"
        raise UserError(
            f"{what} cannot hold parallel.tensor={config.parallel.tensor} x "
            f"parallel.pipeline={config.parallel.pipeline} x parallel.context={config.parallel.context} "
            f"with parallel.expert={config.parallel.expert}; start {start}"
        )
    if not apart and world_size % config.rollout.tensor:
        raise UserError(
            f"{world_size} rank(s) cannot be parted into replicas of rollout.tensor={config.rollout.tensor} ranks; "
            "start a multiple of them"
        )


_LAID_OUT = (
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
    "num_layers",
    "num_experts",
)


def check_layout(sizes: Mapping[str, int], parallel: ParallelConfig, prefix: str) -> None:
    """Raise UserError unless a model of these sizes (named as in ModelConfig; `prefix` stands before the names in
    messages) can be spread as `parallel` says."""
    for what in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "shared_expert_size"):
        if sizes.get(what, 0) % parallel.tensor:
            raise UserError(
                f"{prefix}{what}={sizes[what]} is not a multiple of parallel.tensor={parallel.tensor}"
                "; change one of them"
            )
    if sizes["moe_ffn_hidden_size"] % parallel.expert_tensor_size:
        name = "tensor" if parallel.expert_tensor is None else "expert_tensor"
        raise UserError(
            f"{prefix}moe_ffn_hidden_size={sizes['moe_ffn_hidden_size']} is not a multiple of "
            f"parallel.{name}={parallel.expert_tensor_size}; change one of them"
        )
    stage_layers(sizes["num_layers"], parallel, prefix)
    experts = sizes["num_experts"]
    if parallel.expert_tensor_size != parallel.tensor and not experts:
        raise UserError(f"parallel.expert_tensor={parallel.expert_tensor}, but the model has no experts; remove it")
    if parallel.expert > 1 and not experts:
        raise UserError(
            f"parallel.expert={parallel.expert}, but the model has no experts; set parallel.expert=1, or take a "
            "model with experts"
        )
    if experts % parallel.expert:
        raise UserError(
            f"{prefix}num_experts={experts} cannot be spread over parallel.expert={parallel.expert} ranks; "
            "make it a multiple"
        )
    if experts and parallel.tensor > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"parallel.tensor={parallel.tensor} with {prefix}num_experts={experts} needs sequence parallelism, "
            "or every expert would see every token more than once; set parallel.sequence_parallel=true"
        )


def check_router_replay(config: RunConfig, experts: int) -> None:
    """Raise UserError if there are no routers to replay."""
    if config.train.router_replay and not experts:
        raise UserError("train.router_replay=true, but the model has no experts; set train.router_replay=false")


def stage_layers(num_layers: int, parallel: ParallelConfig, prefix: str = "") -> list[int]:
    """Layers of every pipeline stage.

    Raises:
        UserError: they cannot be spread as `parallel` says; `prefix` stands before `num_layers` in the message.
    """
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    given = [layers for layers in (first, last) if layers is not None]
    stages, rest = parallel.pipeline - len(given), num_layers - sum(given)
    if not given and rest % stages:
        raise UserError(
            f"{prefix}num_layers={num_layers} is not a multiple of parallel.pipeline={parallel.pipeline}"
            "; change one of them, or set parallel.first_stage_layers or last_stage_layers"
        )
    if (stages and (rest <= 0 or rest % stages)) or (not stages and rest):
        raise UserError(
            f"{prefix}num_layers={num_layers} without parallel.first_stage_layers={first} and "
            f"last_stage_layers={last} leaves {rest} layers for {stages} stages; make it a positive multiple"
        )
    middle = [rest // stages] * stages if stages else []
    return ([] if first is None else [first]) + middle + ([] if last is None else [last])
