"""The closure for Megatron-Core's schedules; imports no Megatron itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.config import PolicyLossConfig
from megatron_aspo.loss.logprobs import vocab_parallel_logprobs
from megatron_aspo.loss.reduction import policy_loss


def megatron_loss_func(
    logits: Tensor,
    *,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    config: PolicyLossConfig,
    tp_group: dist.ProcessGroup | None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The policy loss in the form that Megatron-Core's schedules take from a forward step.

    Use it as `return model(...), partial(megatron_loss_func, targets=..., ...)` with
    `calculate_per_token_loss=True`: the schedule sums what is returned over micro-batches, and
    `finalize_model_grads` divides the gradients by the denominator summed over data- and context-parallel
    ranks. So nothing here is scaled by ranks or micro-batches, and the gradient is that of any other layout.

    Args:
        logits: [..., V/tp], the model's parallel output.
        targets, advantages, loss_mask, old_logprobs, ...: [...], as in `policy_loss`. `old_logprobs=None`
            takes the current policy's own (ratio 1: plain policy gradient; with advantages 1, supervised
            learning).
        tp_group: the tensor-parallel group.
        temperature: that of sampling, so that the trainer's distribution is the sampler's.

    Returns:
        (loss_sum, denominator as int32, {"metrics": name -> (sum, count), "max_abs_log_ratio": scalar}).
    """
    logprobs, entropy = vocab_parallel_logprobs(logits, targets, tp_group, temperature=temperature)
    if old_logprobs is None:
        old_logprobs = logprobs.detach()
    out = policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        config,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        sequence_ids=sequence_ids,
    )
    log_ratio = torch.where(loss_mask != 0, logprobs.detach() - old_logprobs, 0.0)
    largest = log_ratio.abs().amax() if log_ratio.numel() else log_ratio.new_zeros(())
    return out.loss_sum, out.denominator.int(), {"metrics": out.metrics, "max_abs_log_ratio": largest}
