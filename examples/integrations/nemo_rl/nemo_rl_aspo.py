"""ASPO in NeMo-RL: `ASPOLossFn` takes the place of `ClippedPGLossFn`. See README.md."""

from __future__ import annotations

from typing import Any

import torch
from nemo_rl.algorithms.loss.interfaces import LossType, MetricNormalizer
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn
from torch import Tensor

from megatron_aspo.loss import PolicyLossConfig, policy_loss

# Settings that request another objective or a term that ASPO's loss does not have -> the value that turns them off.
# They are explicit: a recipe may set them, and the KL penalty is 0.01 by default.
REFUSED = {
    "disable_ppo_ratio": "false",
    "force_on_policy_ratio": "false",
    "use_cispo": "false",
    "sequence_level_importance_ratios": "false",
    "use_importance_sampling_correction": "false",
    "truncated_importance_sampling_type": "null",
    "truncated_importance_sampling_ratio": "null",
    "truncated_importance_sampling_ratio_min": "null",
    "positive_example_nll_weight": "0",
    "reference_policy_kl_penalty": "0",
}


class ASPOLossFn(ClippedPGLossFn):
    """Minimizes ASPO, and reports everything that NeMo-RL's loss reports, since its trainer reads some of it.

    The section `loss_fn` stays: ratio_clip_min, ratio_clip_max, ratio_clip_c (the soft cap; null: the objective's own,
    3 for ASPO), token_level_loss. `loss` goes into PolicyLossConfig: {"anchor": "rollout"} sets r = pi / pi_generation.
    """

    def __init__(self, *args: Any, loss: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        loss = {"objective": "aspo"} | (loss or {})
        anchored = loss.get("anchor") == "rollout"
        corrected = {"use_importance_sampling_correction"} if anchored else ()  # by the ratio
        if wrong := [name for name in REFUSED if getattr(self, name, None) and name not in corrected]:
            refused = ", ".join(f"loss_fn.{name}={getattr(self, name)}" for name in wrong)
            fix = " ".join(f"loss_fn.{name}={REFUSED[name]}" for name in wrong)
            if anchored and any(name.startswith("truncated") for name in wrong):
                fix += " and anchor_band in loss, such as (0.2, 5)"
            raise ValueError(f"ASPOLossFn does not take {refused}: set {fix} (see its README)")
        self.policy_loss = PolicyLossConfig(
            **loss,
            clip_low=self.ratio_clip_min,
            clip_high=self.ratio_clip_max,
            dual_clip="default" if self.ratio_clip_c is None else self.ratio_clip_c,
            aggregation="token-mean" if self.loss_type == LossType.TOKEN_LEVEL else "seq-mean-token-mean",
        )
        for sign in ("pos", "neg"):
            self.metric_normalizations[f"clip_fraction_{sign}"] = MetricNormalizer.TOKENS
            self.metric_normalizations[f"soft_clip_fraction_{sign}"] = MetricNormalizer.TOKENS

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """This micro-batch's share of the mean over the global batch. Log-probs are [responses, tokens - 1]."""
        with torch.no_grad():
            _, metrics = super().__call__(next_token_logprobs, data, global_valid_seqs, global_valid_toks)
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        kept = data.get("curr_logprobs_keep_mask")  # where top-k or top-p left the token its probability
        advantages, sampler = data["advantages"][:, 1:], None
        if self.policy_loss.anchor == "rollout":
            sampler = data["generation_logprobs"][:, 1:]
            known = sampler.isfinite()  # others have no gradient, as under ClippedPGLossFn's correction
            advantages = advantages.masked_fill(~known, 0.0)
            sampler = torch.where(known, sampler, next_token_logprobs.detach())
        out = policy_loss(
            next_token_logprobs,
            data["prev_logprobs"][:, 1:],
            advantages,
            mask if kept is None else mask * kept,
            self.policy_loss,
            rollout_logprobs=sampler,
        )
        token_level = self.loss_type == LossType.TOKEN_LEVEL
        loss = out.loss_sum / (global_valid_toks if token_level else global_valid_seqs).clamp(min=1)
        # The trainer adds up the metrics of micro-batches.
        clips = {name: pair[0] for name, pair in out.metrics.items() if "clip_fraction" in name}
        shares = {name: float(count / global_valid_toks.clamp(min=1)) for name, count in clips.items()}
        return loss, {**metrics, **shares, "loss": loss.item()}
