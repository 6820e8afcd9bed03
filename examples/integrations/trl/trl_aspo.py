"""ASPO in TRL: `ASPOTrainer` takes the place of `GRPOTrainer`. See README.md."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from megatron_aspo.loss import PolicyLossConfig, policy_loss

# Arguments of the forward pass besides text: images and their layout, token types.
EXTRAS = set(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
AGGREGATIONS = {"dapo": "token-mean", "grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm"}


class ASPOTrainer(GRPOTrainer):
    """GRPOTrainer with ASPO's weights. `loss_type` names the aggregation: dapo, grpo or dr_grpo. `loss` goes into
    PolicyLossConfig: {"anchor": "rollout", "anchor_band": (0.2, 5)} sets r = pi / pi_vllm."""

    def __init__(self, *args: Any, loss: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.args
        level = settings.importance_sampling_level
        refused = {
            f"loss_type={settings.loss_type} (use dapo, grpo or dr_grpo)": settings.loss_type not in AGGREGATIONS,
            "aggregation in loss (set loss_type to dapo, grpo or dr_grpo)": "aggregation" in (loss or {}),
            f"importance_sampling_level={level} (use token)": level != "token",
            "top_entropy_quantile (leave it out)": settings.top_entropy_quantile < 1.0,
            "off_policy_mask_threshold (leave it out)": settings.off_policy_mask_threshold is not None,
            "beta with use_bias_correction_kl (set it to False)": self.beta != 0.0 and settings.use_bias_correction_kl,
            "an entropy bonus (leave out entropy_coef and use_adaptive_entropy)": self._entropy_bonus_enabled,
            "a mixture's router loss (set router_aux_loss_coef=0.0)": self.aux_loss_enabled,
        }
        if wrong := [name for name, refuse in refused.items() if refuse]:
            raise ValueError(f"ASPOTrainer does not take {', '.join(wrong)}; see its README")
        of_trl: dict[str, Any] = {
            "clip_low": self.epsilon_low,
            "clip_high": self.epsilon_high,
            "dual_clip": "default" if settings.delta is None else settings.delta,
            "aggregation": AGGREGATIONS[settings.loss_type],
            "norm_length": settings.max_completion_length if settings.loss_type == "dr_grpo" else None,
            "kl_coef": self.beta,
        }
        self.policy_loss = PolicyLossConfig(**(of_trl | {"objective": "aspo"} | (loss or {})))

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        completion, mask = inputs["completion_ids"], inputs["completion_mask"]
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], completion], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            completion.shape[1],
            compute_entropy=True,
            **{name: inputs[name] for name in EXTRAS & inputs.keys()},
        )
        sampler = inputs.get("sampling_per_token_logps") if self.policy_loss.anchor == "rollout" else None
        if sampler is not None:
            if "importance_sampling_ratio" in inputs:
                raise ValueError("anchor=rollout corrects already: set vllm_importance_sampling_correction=False")
            sampler = torch.where(sampler.isnan(), logprobs.detach(), sampler)  # vLLM returned none: ratio 1
        advantages = inputs["advantages"]
        if advantages.dim() == 1:
            advantages = advantages[:, None]
        # TRL's correction of the sampler's mismatch is a positive factor, and may be one per response.
        advantages = (advantages * inputs.get("importance_sampling_ratio", 1.0)).expand_as(logprobs)
        out = policy_loss(
            logprobs,
            inputs.get("old_per_token_logps"),  # None: the batch gets one update, so that every ratio is 1
            advantages,
            mask * inputs.get("tool_mask", 1),
            self.policy_loss,
            entropy=entropy,
            ref_logprobs=inputs.get("ref_per_token_logps"),
            rollout_logprobs=sampler,
        )
        self._report(out.metrics)
        return out.loss_sum / self._denominator(inputs)

    def _denominator(self, inputs: dict[str, Tensor]) -> Tensor | float:
        """GRPOTrainer's denominator: the losses of an update's micro-batches add up, averaged over processes."""
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.args.loss_type != "dapo":
            return float(len(inputs["completion_ids"]) * steps)
        share = steps / self.args.steps_per_generation if self.model.training else 1.0
        return inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes * share

    def _report(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        pairs = torch.stack([torch.stack(pair).float() for pair in metrics.values()])
        totals = self.accelerator.reduce(pairs, reduction="sum")
        means = (totals[:, 0] / totals[:, 1]).tolist()  # 0 / 0 where no token is of the sign: TRL's log leaves NaN out
        for name, mean in zip(metrics, means, strict=True):
            self._metrics["train" if self.model.training else "eval"][f"aspo/{name}"].append(mean)
