"""Checks across sections of a configuration. Imports neither torch nor Megatron."""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Iterator, Mapping

from megatron_aspo.config.fp8 import check_fp8_layout
from megatron_aspo.config.loss import ObjectiveName
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.errors import UserError

_SIZES = (
    *("num_attention_heads", "num_query_groups", "hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size"),
    *("num_layers", "num_experts"),
)

MAX_ROUTED_EXPERTS = 256
"""Experts that `Sample.routes`, uint8, can number."""


def check_together(config: RunConfig) -> None:
    """Raise UserError for the first contradiction between sections."""
    model = config.model
    if not model.hf_path:
        sizes = {name: getattr(model, name) or 0 for name in _SIZES}
        check_layout(sizes, config.parallel, "model.")
        check_router_replay(config.train, model.num_experts)
        head = model.hidden_size // model.num_attention_heads
        shape = sizes | {"kv_channels": head, "moe_ffn_hidden_size": model.expert_hidden_size}
        shape["dense_layers"] = 0 if model.num_experts else model.num_layers
        check_fp8_layout(shape, config.fp8, config.parallel, "model.")
    for message in _contradictions(config):
        raise UserError(message)


def _contradictions(config: RunConfig) -> Iterator[str]:
    model, rollout, train, fp8 = config.model, config.rollout, config.train, config.fp8
    recipe, tokens = f"fp8.recipe={fp8.recipe}", f"model.max_sequence_length={model.max_sequence_length}"
    if model.dtype != "bfloat16":
        offload = config.optimizer.cpu_offload
        for is_on, setting in (
            (fp8.recipe is not None, recipe),
            (rollout.quantization == "fp8", "rollout.quantization=fp8"),
            (offload > 0, f"optimizer.cpu_offload={offload}"),
            (config.parallel.moe_dispatcher == "flex", "parallel.moe_dispatcher=flex"),
        ):
            if is_on:
                yield f"{setting} needs model.dtype=bfloat16; change one of them"
    if fp8.recipe is not None and rollout.engine == "megatron":
        yield f"rollout.engine=megatron decodes single tokens, which {recipe} cannot; set rollout.engine=vllm"
    if config.data.chat_template and not model.hf_path:
        yield "data.chat_template=true needs the tokenizer of model.hf_path; set it, or data.chat_template=false"
    for source in config.data.all_sources:
        environment = f"rollout.environment={rollout.environment}"
        if rollout.environment == "retry" and not source.task:
            yield f"{environment} needs data.task, not {source.label}; change one of them"
        if rollout.environment == "sokoban" and source.task != "sokoban":
            yield f"{environment} needs data.task=sokoban, not {source.label}; change one of them"
    response = f"rollout.max_response_tokens={rollout.max_response_tokens}"
    if config.reward.overlong_buffer > rollout.max_response_tokens:
        yield f"reward.overlong_buffer={config.reward.overlong_buffer} exceeds {response}; lower it"
    if rollout.engine == "megatron" and config.parallel.virtual_pipeline > 1:
        yield f"parallel.virtual_pipeline={config.parallel.virtual_pipeline} needs rollout.engine=vllm; change one"
    if rollout.engine == "megatron" and config.parallel.expert_tensor_size != config.parallel.tensor:
        yield f"parallel.expert_tensor={config.parallel.expert_tensor} needs rollout.engine=vllm; change one of them"
    if rollout.engine == "vllm" and model.num_experts > 0:
        yield f"model.num_experts={model.num_experts} needs rollout.engine=megatron, or model.hf_path instead"
    if train.router_replay == "sampler" and rollout.engine != "vllm":
        yield f"train.router_replay=sampler needs rollout.engine=vllm, not {rollout.engine}; or set it to trainer"
    if train.router_replay == "trainer" and config.loss.anchor == "rollout":
        yield (
            "train.router_replay=trainer records experts in the pass for old log-probs, which loss.anchor=rollout "
            "leaves out; set train.router_replay=sampler or none"
        )
    if 0 < config.warmup.updates <= config.optimizer.lr_warmup_updates and config.warmup.lr_decay:
        setting = f"optimizer.lr_warmup_updates={config.optimizer.lr_warmup_updates}"
        yield f"warmup.lr_decay=true needs more warmup.updates={config.warmup.updates} than {setting}; raise the first"
    if train.mini_batch_prompts > rollout.prompts_per_step:
        mini_batch = f"train.mini_batch_prompts={train.mini_batch_prompts}"
        yield f"{mini_batch} exceeds rollout.prompts_per_step={rollout.prompts_per_step}; lower the first"
    if rollout.advantage == "maxrl" and config.reward.overlong_buffer:
        yield "rollout.advantage=maxrl needs rewards >= 0; set reward.overlong_buffer=0, or another advantage"
    if rollout.max_response_tokens >= model.max_sequence_length:
        yield f"{response} leaves no room for a prompt in {tokens}; lower the first or raise the second"
    padded = math.ceil(model.max_sequence_length / config.stream_multiple) * config.stream_multiple
    if train.max_tokens_per_micro_batch < padded:
        stream = f"train.max_tokens_per_micro_batch={train.max_tokens_per_micro_batch}"
        yield f"{stream} is less than {padded}, the padded length of a sample of {tokens}; raise it"


def config_warnings(config: RunConfig) -> list[str]:
    """Return a line for each setting that is valid but probably unintended."""
    warnings: list[str] = []
    loss, rollout = config.loss, config.rollout
    anchored, corrected = loss.anchor == "rollout", loss.rollout_correction != "none"
    ages = {"max_staleness": (rollout.max_staleness, 0), "oversample": (rollout.oversample, 1)}
    older = next((f"rollout.{name}={value:g}" for name, (value, off) in ages.items() if value > off), "")
    inert = config.updates_per_step == 1 and loss.objective in typing.get_args(ObjectiveName)
    if inert and not (anchored and older):
        remedy = "lower train.mini_batch_prompts or raise train.epochs"
        if older:
            remedy = f"with {older} set loss.anchor=rollout, whose ratio acts with one update too"
            runs = "with truncated weights alone 18 of 24" if loss.rollout_correction == "truncate" else ""
            if not loss.corrects_rollout:
                runs = "without it all 24"
            if runs:
                remedy += (
                    f"; {runs} runs of the study on rollouts 1 to 8 steps old collapsed (lr 5e-4, docs/evidence.md)"
                )
        is_one = "apart from rounding " if anchored else ""
        warnings.append(
            f"{loss.objective.upper()} is inert: with one optimizer update per rollout batch every importance ratio is "
            f"{is_one}1 and all objectives have the same gradient; {remedy}"
        )
    rounds = rollout.engine != "megatron" or config.model.num_experts or config.model.dtype == "bfloat16"
    if anchored and loss.anchor_band is None and rounds:
        cause = "bfloat16, or other experts" if rollout.engine == "megatron" else f"rollout.engine={rollout.engine}"
        if config.model.hf_path and rollout.engine == "vllm" and config.train.router_replay != "sampler":
            cause += "; a model with experts needs train.router_replay=sampler, too"
        warnings.append(
            f"loss.anchor=rollout takes differences in rounding ({cause}) for moves of the policy, and a token far off "
            "gets a large weight; drop such tokens by loss.anchor_band, such as [0.2, 5]"
        )
    warnings += [f"loss.{line}" for line in loss.without_effect]
    if config.train.recompute == "none" and config.train.recompute_modules:
        modules = ", ".join(config.train.recompute_modules)
        warnings.append(f"train.recompute_modules=[{modules}] does nothing with train.recompute=none; set selective")
    if config.fp8.recipe == "delayed" and not anchored:
        warnings.append(
            "fp8.recipe=delayed takes scales from earlier passes: the passes for old log-probs and updates differ, and "
            "the first importance ratios are not 1; current, blockwise and mxfp8 reproduce them"
        )
    if config.fp8.recipe == "delayed" and config.train.recompute == "full" and config.fp8.amax_history > 1:
        warnings.append(
            f"train.recompute=full moves on the history of fp8.amax_history={config.fp8.amax_history} twice in a "
            "pass, so that its scales differ from those without recomputation; 1 is exact"
        )
    for name, value, off in (("top_p", rollout.top_p, 1), ("top_k", rollout.top_k, 0)):
        if value != off:
            # vLLM reports log-probs of the truncated distribution, the embedded engine of the full one.
            effect = "the importance ratio corrects for the wrong policy"
            if anchored and rollout.engine == "vllm":
                effect = "ratios to the sampler lie below 1 by the share that it leaves out"
            warnings.append(
                f"rollout.{name}={value} truncates the sampler's distribution, but the trainer's log-probs are of the "
                f"full distribution: {effect}; {name}={off} is exact"
            )
    setting = older or ("rollout.quantization=fp8" if rollout.quantization == "fp8" else "")
    if setting and not (corrected or anchored or (inert and older)):
        warnings.append(
            f"{setting} trains on responses of other weights than the policy's without a correction "
            "(loss.rollout_correction=none); loss.anchor=rollout takes the ratio to the sampler, truncate or mask "
            "weight them by pi_old / pi_rollout"
        )
    return warnings


def check_world_size(parallel: ParallelConfig, rollout: RolloutConfig, world_size: int) -> None:
    """Raise UserError unless `world_size` ranks, `rollout.ranks` included, can hold the configured layout."""
    sampling = rollout.ranks
    size, training = parallel.model_parallel_size, world_size - sampling
    if training < 1 or training % size:
        apart = f" besides rollout.ranks={sampling}" if sampling else ""
        more = f"{sampling} ranks more than " if sampling else ""
        raise UserError(
            f"{world_size} rank(s) cannot hold parallel.tensor={parallel.tensor} x pipeline={parallel.pipeline}"
            f" x context={parallel.context} with expert={parallel.expert}{apart}; "
            f"start {more}a multiple of {size} ranks"
        )
    if not sampling and world_size % rollout.tensor:
        raise UserError(
            f"{world_size} rank(s) are no multiple of rollout.tensor={rollout.tensor} ranks; start a multiple"
        )


def check_layout(sizes: Mapping[str, int], parallel: ParallelConfig, prefix: str) -> None:
    """Raise UserError unless a model of these sizes (named as in ModelConfig; `prefix` stands before the names in
    messages) can be spread over the ranks of `parallel`."""
    stage_layers(sizes["num_layers"], parallel, prefix)
    experts = sizes["num_experts"]
    if not experts and parallel.moe_dispatcher == "flex":
        raise UserError("parallel.moe_dispatcher=flex needs a model with experts; remove it")
    if not experts and (parallel.expert > 1 or parallel.expert_tensor_size != parallel.tensor):
        settings = f"parallel.expert={parallel.expert} and parallel.expert_tensor={parallel.expert_tensor}"
        raise UserError(f"{settings} need a model with experts; remove them")
    for name, setting, ranks in (
        ("num_attention_heads", "tensor", parallel.tensor),
        ("num_query_groups", "tensor", parallel.tensor),
        ("linear_num_key_heads", "tensor", parallel.tensor),
        ("ffn_hidden_size", "tensor", parallel.tensor),
        ("shared_expert_size", "tensor", parallel.tensor),
        ("moe_ffn_hidden_size", "expert_tensor", parallel.expert_tensor_size),
        ("num_experts", "expert", parallel.expert),
    ):
        size = sizes.get(name, 0)
        if size % ranks:
            raise UserError(
                f"{prefix}{name}={size} is not a multiple of parallel.{setting}={ranks}; change one of them"
            )
    if experts and parallel.tensor > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"parallel.tensor={parallel.tensor} with {prefix}num_experts={experts} needs sequence parallelism, "
            "or every expert would get every token more than once; set parallel.sequence_parallel=true"
        )


def check_router_replay(train: TrainConfig, experts: int) -> None:
    """Raise UserError if there are no routers to replay, or more experts than a byte can number."""
    setting = f"train.router_replay={train.router_replay}"
    if train.router_replay != "none" and not experts:
        raise UserError(f"{setting}, but the model has no experts; set train.router_replay=none")
    if train.router_replay == "sampler" and experts > MAX_ROUTED_EXPERTS:
        raise UserError(
            f"{setting} stores an expert in a byte, but the model has {experts}; set train.router_replay=trainer"
        )


def stage_layers(num_layers: int, parallel: ParallelConfig, prefix: str = "") -> list[int]:
    """Return the layers of every pipeline stage; UserError if they cannot be spread, `prefix` as in `check_layout`."""
    first, last = ([] if n is None else [n] for n in (parallel.first_stage_layers, parallel.last_stage_layers))
    stages, rest = parallel.pipeline - len(first + last), num_layers - sum(first + last)
    each = rest // stages if stages else 0
    if each * stages != rest or (stages and each < 1):
        raise UserError(
            f"{prefix}num_layers={num_layers} cannot be spread evenly over parallel.pipeline={parallel.pipeline} stages"
            f" with parallel.first_stage_layers={parallel.first_stage_layers} and "
            f"parallel.last_stage_layers={parallel.last_stage_layers}; change one of them"
        )
    layers = first + [each] * stages + last
    if odd := [count for count in layers if count % parallel.virtual_pipeline]:
        raise UserError(
            f"a pipeline stage of {odd[0]} of {prefix}num_layers={num_layers} cannot be cut into "
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} equal chunks; change one of them"
        )
    return layers


def chunk_layers(num_layers: int, parallel: ParallelConfig) -> list[list[range]]:
    """Return, for every pipeline stage, the layers of its chunks, counted from 0.

    The first chunks of all stages have the first layers, the second chunks have the next ones.
    """
    sizes = [layers // parallel.virtual_pipeline for layers in stage_layers(num_layers, parallel)]
    *starts, round_size = itertools.accumulate(sizes, initial=0)
    offsets = [chunk * round_size for chunk in range(parallel.virtual_pipeline)]
    return [
        [range(start + offset, start + offset + size) for offset in offsets]
        for start, size in zip(starts, sizes, strict=True)
    ]
