"""ASPO in NeMo-RL: `ASPOLossFn` takes the place of `ClippedPGLossFn`. See README.md."""

from __future__ import annotations

from typing import Any

import torch
from nemo_rl.algorithms.loss.interfaces import LossType, MetricNormalizer
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn
from torch import Tensor

from megatron_aspo.loss import PolicyLossConfig, policy_loss
from megatron_aspo.loss.validation import named_as

# Fields of the configuration that ask for another objective or for a term that ASPO's loss does not make, and the value
# that asks for none. It must be said: a recipe may have another, and the KL penalty is 0.01 by default.
REFUSED = {
    "disable_ppo_ratio": "false",
    "force_on_policy_ratio": "false",
    "use_cispo": "false",
    "sequence_level_importance_ratios": "false",
    "use_importance_sampling_correction": "false",
    "positive_example_nll_weight": "0",
    "reference_policy_kl_penalty": "0",
}
NEMO_RLS_NAMES = {"clip_low": "ratio_clip_min", "clip_high": "ratio_clip_max", "dual_clip": "ratio_clip_c"}


class ASPOLossFn(ClippedPGLossFn):
    """NeMo-RL's own loss function in everything it reports (its trainer reads some of that), ASPO in what is minimized.

    The same section of the configuration: ratio_clip_min, ratio_clip_max, ratio_clip_c (the soft cap; 3 if null),
    token_level_loss.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if wrong := [name for name in REFUSED if getattr(self, name, None)]:
            given = ", ".join(f"loss_fn.{name}={getattr(self, name)}" for name in wrong)
            fix = " ".join(f"loss_fn.{name}={REFUSED[name]}" for name in wrong)
            raise ValueError(f"ASPOLossFn does not take {given}: set {fix} (see its README)")
        with named_as({ours: f"loss_fn.{theirs}" for ours, theirs in NEMO_RLS_NAMES.items()}):
            self.policy_loss = PolicyLossConfig(
                objective="aspo",
                clip_low=self.ratio_clip_min,
                clip_high=self.ratio_clip_max,
                dual_clip=3.0 if self.ratio_clip_c is None else self.ratio_clip_c,
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
        out = policy_loss(
            next_token_logprobs,
            data["prev_logprobs"][:, 1:],
            data["advantages"][:, 1:],
            mask if kept is None else mask * kept,
            self.policy_loss,
            allow_empty=True,
        )
        token_level = self.loss_type == LossType.TOKEN_LEVEL
        loss = out.loss_sum / (global_valid_toks if token_level else global_valid_seqs).clamp(min=1)
        # The trainer adds up what micro-batches report.
        clips = {name: pair[0] for name, pair in out.metrics.items() if "clip_fraction" in name}
        shares = {name: float(count / global_valid_toks.clamp(min=1)) for name, count in clips.items()}
        return loss, {**metrics, **shares, "loss": loss.item()}
