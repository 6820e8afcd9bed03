"""ASPO in slime: the function of `--custom-loss-function-path slime_aspo.aspo_loss`. See README.md."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_aspo.loss import PolicyLossConfig, policy_loss


def aspo_loss(
    args: Namespace, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch, and what slime logs, each through slime's own reduction.

    Args:
        args: eps_clip, eps_clip_high and eps_clip_c are the clips (the soft cap is 3 by default); entropy_coef.
        batch: per sample, on this context-parallel rank: advantages, log_probs (of the old policy), ...
        logits: [1, T, V/tp].
        sum_of_sample_mean: from per-token values [tokens of the responses] to a number; linear.
    """
    # slime's: they know its layouts of packed and context-parallel streams.
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy, get_rollout_top_p_logprob_kwargs

    _refuse(args)
    _, by_sample = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
        **get_rollout_top_p_logprob_kwargs(args, batch),
    )
    logprobs, entropy = torch.cat(by_sample["log_probs"]), torch.cat(by_sample["entropy"])
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old_logprobs = torch.cat(old) if old else logprobs.detach()
    advantages = torch.cat(batch["advantages"])

    # The reduction is linear, so it is a weight of each token; and a token's weight may as well be its advantage's.
    with torch.enable_grad():
        zeros = torch.zeros_like(logprobs, requires_grad=True)
        (weights,) = torch.autograd.grad(sum_of_sample_mean(zeros), zeros)
    config = PolicyLossConfig(
        objective="aspo",
        clip_low=args.eps_clip,
        clip_high=args.eps_clip if args.eps_clip_high is None else args.eps_clip_high,
        dual_clip=3.0 if args.eps_clip_c is None else args.eps_clip_c,
    )
    out = policy_loss(logprobs, old_logprobs, advantages * weights, weights != 0, config, allow_empty=True)
    mean_entropy = sum_of_sample_mean(entropy)
    loss = out.loss_sum - args.entropy_coef * mean_entropy
    if not logprobs.numel():  # every rank must go backward through the model
        loss = loss + 0 * logits.sum()

    ratio = (logprobs.detach() - old_logprobs).exp()
    positive = advantages > 0
    outside = torch.where(positive, ratio > 1 + config.clip_high, ratio < 1 - config.clip_low)
    flipped = torch.where(positive, 1 / ratio, ratio)
    reported = {
        "pg_clipfrac": outside & (advantages != 0),
        "soft_clipfrac": (flipped > config.dual_clip) & (advantages != 0) & ~outside,
        "ppo_kl": old_logprobs - logprobs.detach(),
    }
    if rollout := batch.get("rollout_log_probs"):
        against = logprobs.detach() if args.use_rollout_logprobs else old_logprobs
        reported["train_rollout_logprob_abs_diff"] = (against - torch.cat(rollout)).abs()
    log = {name: sum_of_sample_mean(values.to(logprobs.dtype)).detach() for name, values in reported.items()}
    pg_loss, mean_entropy = out.loss_sum.detach(), mean_entropy.detach()
    return loss, {"loss": loss.detach(), "pg_loss": pg_loss, "entropy_loss": mean_entropy, **log}


def _refuse(args: Namespace) -> None:
    """What asks for another objective, or for a term that this loss does not have."""
    estimator = args.advantage_estimator
    asked = {
        "--kl-loss-coef": args.use_kl_loss and args.kl_loss_coef != 0,
        "--use-tis": args.use_tis,
        "--use-opsm": args.use_opsm,
        "--get-mismatch-metrics": args.get_mismatch_metrics,
        "--use-score-centering": getattr(args, "use_score_centering", False),
        "--custom-pg-loss-reducer-function-path": getattr(args, "custom_pg_loss_reducer_function_path", None),
        f"--advantage-estimator {estimator}": estimator in ("gspo", "cispo"),
    }
    if names := [name for name, value in asked.items() if value]:
        raise ValueError(f"slime_aspo.aspo_loss does not take {', '.join(names)}: leave it out (see its README)")
