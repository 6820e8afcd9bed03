"""Megatron's distributed Adam and its learning-rate schedule, from the configuration."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_aspo.config.fp8 import Fp8Config
from megatron_aspo.config.training import OptimizerConfig
from megatron_aspo.errors import UserError

_NEVER_DECAY = 1 << 62
"""The learning rate is constant after its warm-up; the scheduler requires an end."""


def build_optimizer(
    chunks: list[Any], config: OptimizerConfig, fp8: Fp8Config, decay_updates: int | None = None
) -> tuple[Any, OptimizerParamScheduler]:
    """The optimizer of a model's DistributedDataParallel chunks and its schedule, before the first update.

    Args:
        decay_updates: number of updates after which the learning rate, which falls linearly, is 0; None: constant.

    Raises:
        UserError: a setting needs a GPU or Transformer Engine.
    """
    model = chunks[0]
    # The optimizer casts float32 weights to FP8 if the model keeps FP8 weights.
    fp8_settings: dict[str, Any] = {"fp8_recipe": fp8.mcore_recipe} if fp8.recipe else {}
    optimizer: Any = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=0.0,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=model.ddp_config.overlap_param_gather,
            **offload_settings(config, next(model.parameters()).is_cuda),
            **fp8_settings,
        ),
        chunks,
    )
    first, *_ = optimizer.chained_optimizers
    for part in optimizer.chained_optimizers:
        if not has_parameters(part) and not HAVE_APEX_OR_TE:
            part.state_dict = partial(_state_without_parameters, part, first)
        part.get_parameter_state_dp_zero = partial(_padded_state, part, part.get_parameter_state_dp_zero)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=0.0,
        lr_warmup_steps=config.lr_warmup_updates,
        lr_decay_steps=decay_updates or _NEVER_DECAY,
        lr_decay_style="linear" if decay_updates else "constant",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    scheduler.step(1)  # the first update has lr / warm-up updates, not 0
    return optimizer, scheduler


def has_parameters(part: Any) -> bool:
    """Whether one of the optimizer's parts has any on this pipeline stage: the experts' has none where no layer has."""
    return bool(part.buffers)


def _state_without_parameters(part: Any, first: Any) -> dict[str, Any]:
    """The state, for a checkpoint, of a part without parameters: its groups, at the first part's number of updates.

    Megatron-Core 0.19.2 takes the number from the state of each parameter, and fails if there is none.
    """
    step = first.state_dict()["optimizer"]["param_groups"][0]["step"]
    groups = [{name: value for name, value in group.items() if name != "params"} for group in part.param_groups]
    return {"optimizer": {"param_groups": [group | {"step": step} for group in groups]}}


def _padded_state(optimizer: Any, gather: Any, *args: Any, **kwargs: Any) -> dict[Any, Any] | None:
    """The states of all data-parallel ranks for a checkpoint, with the padding between buckets.

    Megatron-Core 0.19.2 joins the buckets without it and then looks for each parameter where it is with it. Every
    parameter behind a padded bucket, as the end of a bucket or tied embeddings may need it, would be saved shifted.
    """
    state = gather(*args, **kwargs)
    for i, buffer in enumerate(optimizer.buffers if state else []):
        if all(bucket.numel_unpadded == bucket.grad_data.numel() for bucket in buffer.buckets[:-1]):
            continue
        for tensors in state[i].values():
            for name, joined in tensors.items():
                if torch.is_tensor(joined):
                    tensors[name], start = joined.new_zeros(buffer.numel), 0
                    for bucket in buffer.buckets:
                        part = joined[start : start + bucket.numel_unpadded]
                        tensors[name][bucket.offset : bucket.offset + bucket.numel_unpadded] = part
                        start += bucket.numel_unpadded
    return state


def offload_settings(config: OptimizerConfig, on_gpu: bool) -> dict[str, Any]:
    """Megatron's settings for optimizer states that are not float32 on the GPU; empty if all are.

    Megatron keeps a second float32 copy of the weights on the GPU unless the optimizer is "precision-aware".
    """
    if config.cpu_offload:
        if not on_gpu:
            raise UserError(
                f"optimizer.cpu_offload={config.cpu_offload} needs a GPU to offload from; set optimizer.cpu_offload=0"
            )
        return {
            "use_precision_aware_optimizer": True,
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": config.cpu_offload,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    if config.moments_dtype == "bfloat16":
        if importlib.util.find_spec("transformer_engine") is None:
            raise UserError(
                "optimizer.moments_dtype=bfloat16 needs Transformer Engine's optimizer, which is not installed; set "
                "optimizer.moments_dtype=float32"
            )
        moments = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
        # By default the float32 weights are kept as int16 remainders, which a checkpoint cannot be loaded into.
        return {"use_precision_aware_optimizer": True, "store_param_remainders": False} | moments
    return {}
