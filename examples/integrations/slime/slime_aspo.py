"""ASPO in slime: the function of `--custom-loss-function-path slime_aspo.aspo_loss`. See README.md."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_aspo.loss import PolicyLossConfig, policy_loss
from megatron_aspo.loss.validation import check_shapes


def aspo_loss(
    args: Namespace, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch and its metrics, each through slime's own reduction.

    Args:
        args: eps_clip, eps_clip_high and eps_clip_c are the clips (the soft cap is 3 by default); entropy_coef.
        batch: per sample, on this context-parallel rank: advantages, log_probs (of the old policy), ...
        logits: [1, T, V/tp].
        sum_of_sample_mean: linear, from per-token values [tokens of the responses] to a number.
    """
    # slime's functions handle its packed and context-parallel layouts.
    import slime.backends.megatron_utils.loss as slime_loss

    config = _config(args)
    _, by_sample = slime_loss.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
        **slime_loss.get_rollout_top_p_logprob_kwargs(args, batch),
    )
    logprobs, entropy = torch.cat(by_sample["log_probs"]), torch.cat(by_sample["entropy"])
    now, old, rollout = logprobs.detach(), batch.get("log_probs"), batch.get("rollout_log_probs")
    if args.use_rollout_logprobs and not rollout:
        raise ValueError("--use-rollout-logprobs: the rollout gave no rollout_log_probs; return them, or leave it out")
    old_logprobs = torch.cat(old) if old else now
    advantages = torch.cat(batch["advantages"])
    check_shapes(logprobs.shape, "one for each token of the responses", advantages=advantages)
    if rollout:
        sampler = torch.cat(rollout)
        known = sampler.isfinite()
        if args.use_rollout_logprobs:  # a token whose log-prob the sampler did not give has no gradient
            old_logprobs, advantages = torch.where(known, sampler, now), advantages.masked_fill(~known, 0.0)

    # A linear reduction is a weight of each token, which may multiply the advantage.
    with torch.enable_grad():
        zeros = torch.zeros_like(logprobs, requires_grad=True)
        (weights,) = torch.autograd.grad(sum_of_sample_mean(zeros), zeros)
    out = policy_loss(logprobs, old_logprobs, advantages * weights, weights != 0, config)
    mean_entropy = sum_of_sample_mean(entropy)
    loss = out.loss_sum - args.entropy_coef * mean_entropy
    if not logprobs.numel():  # every rank must go backward through the model
        loss = loss + 0 * logits.sum()

    ratio, positive = (now - old_logprobs).exp(), advantages > 0
    outside = torch.where(positive, ratio > 1 + config.clip_high, ratio < 1 - config.clip_low)
    flipped = torch.where(positive, 1 / ratio, ratio)
    reported = {
        "pg_clipfrac": outside & (advantages != 0),
        "soft_clipfrac": (flipped > config.dual_clip) & (advantages != 0) & ~outside,
        "ppo_kl": old_logprobs - now,
    }
    if rollout:
        against = now if args.use_rollout_logprobs else old_logprobs
        reported["train_rollout_logprob_abs_diff"] = torch.where(known, (against - sampler).abs(), 0.0)
    if args.use_kl_loss:  # of weight 0: for its metric
        reference, weight = torch.cat(batch["ref_log_probs"]), ratio if args.use_unbiased_kl else None
        reported["kl_loss"] = slime_loss.compute_approx_kl(now, reference, args.kl_loss_type, weight)
    log = {name: sum_of_sample_mean(values.to(logprobs.dtype)) for name, values in reported.items()}
    log |= {"loss": loss, "pg_loss": out.loss_sum, "entropy_loss": mean_entropy}
    return loss, {name: value.detach() for name, value in log.items()}


def _config(args: Namespace) -> PolicyLossConfig:
    """ASPO with slime's clips. Raises ValueError for settings that request another objective or a missing term."""
    estimator = args.advantage_estimator
    terms = "use_tis", "use_opsm", "get_mismatch_metrics", "use_score_centering", "custom_pg_loss_reducer_function_path"
    unsupported = {
        "--kl-loss-coef": args.use_kl_loss and args.kl_loss_coef != 0,
        **{f"--{name.replace('_', '-')}": getattr(args, name, None) for name in terms},
        "--pg-loss-type reinforce": getattr(args, "pg_loss_type", None) == "reinforce",
        f"--advantage-estimator {estimator}": estimator in ("gspo", "cispo"),
    }
    if names := [name for name, value in unsupported.items() if value]:
        raise ValueError(f"slime_aspo.aspo_loss does not take {', '.join(names)}: leave it out (see its README)")
    return PolicyLossConfig(
        objective="aspo",
        clip_low=args.eps_clip,
        clip_high=args.eps_clip if args.eps_clip_high is None else args.eps_clip_high,
        dual_clip=3.0 if args.eps_clip_c is None else args.eps_clip_c,
    )
