"""The tokens that a policy loss takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.loss import validation

LOWEST_LOGPROB = -1e6
"""Log-probs of -inf (a token that top-k or top-p excludes) count as this, because -inf - -inf is NaN."""


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of a micro-batch: all tensors have one shape [..., T]. Masked slots may hold anything, NaN included.

    Attributes:
        targets: integers, global token ids; None if their log-probs are computed already.
        loss_mask: bool, integer or float; non-zero marks the tokens that are trained on.
        advantages: floating point, one per token (outcome supervision: equal within a response).
        old_logprobs: log-probs by the policy held fixed during the update, natural logarithm. With `anchor="trainer"`
            None stands for the policy's own, which is ratio 1: a plain policy gradient, or with advantages 1 supervised
            learning. With `anchor="rollout"` they are only reported.
        ref_logprobs: log-probs by the reference policy; `kl_coef` needs them.
        rollout_logprobs: log-probs by the sampling engine; `anchor="rollout"` needs them. Their mismatch with
            `old_logprobs` is reported, and corrected as the `rollout_*` settings define. One that is not finite counts
            as 1e6: with `anchor="rollout"` the token has no policy gradient, otherwise a rho of 0.
        sequence_ids: non-negative integers, equal within a response; by default each row is one response.
        positions: [n] int64, ascending indices of the unmasked tokens in the flattened batch. With them the loss never
            waits for a GPU. They are not checked against `loss_mask`, and targets are not checked to be token ids.
    """

    targets: Tensor | None
    loss_mask: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    sequence_ids: Tensor | None = None
    positions: Tensor | None = None

    def check(self, shape: Sequence[int], config: PolicyLossConfig, cp_group: dist.ProcessGroup | None) -> None:
        """Check types, shapes, the group, and that every tensor that the configuration needs is there.

        Args:
            shape: the expected shape of all tensors.

        Raises:
            ValueError: names the tensor or the setting. No collective has been started, and no value read.
        """
        validation.check_tensors(loss_mask=self.loss_mask, advantages=self.advantages)
        floats = {
            "old_logprobs": self.old_logprobs,
            "advantages": self.advantages,
            "ref_logprobs": self.ref_logprobs,
            "rollout_logprobs": self.rollout_logprobs,
        }
        others = {"loss_mask": self.loss_mask, "sequence_ids": self.sequence_ids}
        validation.check_shapes(shape, "one per token", targets=self.targets, **floats, **others)
        validation.check_floating(**floats)
        validation.check_integers(sequence_ids=self.sequence_ids)
        validation.check_positions(self.positions, math.prod(shape))
        validation.check_group("cp_group", cp_group)
        rollout = config.corrects_rollout, "rollout_correction, rollout_sequence_*, rollout_veto"
        for name, (needed, settings) in (
            ("ref_logprobs", (config.kl_coef != 0, "kl_coef")),
            ("rollout_logprobs", (config.anchor == "rollout", "anchor=rollout")),
            ("rollout_logprobs", rollout),
            ("old_logprobs", rollout),
        ):
            if needed and floats[name] is None:
                raise ValueError(f"{name} is missing, but the configuration needs it ({settings})")
        if config.aggregation == "seq-mean-token-sum-norm" and config.norm_length is None:
            raise ValueError(
                "norm_length is missing: seq-mean-token-sum-norm divides by it; set the longest response's length"
            )

    def anchor_logprobs(self, config: PolicyLossConfig) -> Tensor | None:
        """The denominator of the importance ratio; None stands for the policy's own log-probs."""
        return self.rollout_logprobs if config.anchor == "rollout" else self.old_logprobs

    def flattened(self, dtype: torch.dtype) -> TokenBatch:
        """The checked batch as the loss computes with it: [N] each, without gradient, 0 where masked.

        The mask is bool and `sequence_ids` are there; targets and positions are left out.
        """
        mask = (self.loss_mask != 0).reshape(-1)

        def flat(logprobs: Tensor | None) -> Tensor | None:
            return None if logprobs is None else usable(logprobs.detach().reshape(-1).to(dtype), mask)

        rollout = self.rollout_logprobs
        if rollout is not None:
            rollout = torch.where(rollout.isfinite(), rollout, -LOWEST_LOGPROB)
        return TokenBatch(
            None,
            mask,
            torch.where(mask, self.advantages.detach().reshape(-1).to(dtype), 0.0),
            flat(self.old_logprobs),
            flat(self.ref_logprobs),
            flat(rollout),
            self._ids().reshape(-1),
        )

    def transposed(self) -> TokenBatch:
        """A batch [rows, columns] as [columns, rows]; a response is still a row by default."""
        columns = {**vars(self), "sequence_ids": self._ids(), "positions": None}
        swapped: dict[str, Any] = {name: None if c is None else c.transpose(0, 1) for name, c in columns.items()}
        swapped["positions"] = transposed_positions(self.positions, *self.loss_mask.shape)
        return TokenBatch(**swapped)

    def _ids(self) -> Tensor:
        """`sequence_ids`, by default the number of the row."""
        if self.sequence_ids is not None:
            return self.sequence_ids
        shape, device = self.loss_mask.shape, self.loss_mask.device
        return torch.arange(math.prod(shape[:-1]), device=device).view(*shape[:-1], 1).expand(shape)


def transposed_positions(positions: Tensor | None, rows: int, columns: int) -> Tensor | None:
    """Ascending indices into a flattened [rows, columns] -> the same tokens' in [columns, rows]."""
    if positions is None or rows == 1:
        return positions
    return (positions % columns * rows + positions // columns).sort().values


def usable(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Finite log-probs, 0 where masked. This comes before all arithmetic: masked values must not reach exp or sums."""
    return torch.where(mask, logprobs, 0.0).clamp(min=LOWEST_LOGPROB)
