"""The policy loss of tokens whose log-probs are already computed."""
# torch.autograd's apply is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.loss import validation
from megatron_aspo.loss.softmax import statistics_dtype
from megatron_aspo.loss.token_loss import LossOutput, TokenLoss
from megatron_aspo.loss.tokens import TokenBatch


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    config: PolicyLossConfig,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> LossOutput:
    """The policy loss of a batch of tokens, with gradient -w(r, A) * A in each token's log-prob.

    All tensors share one shape [..., T]. Masked slots may hold anything, NaN included.

    Args:
        logprobs: log pi(token), natural logarithm; differentiable.
        old_logprobs, advantages, loss_mask, ref_logprobs, rollout_logprobs, sequence_ids: see `TokenBatch`.
        config: objective, clip ranges, aggregation, coefficients.
        entropy: the policy's entropy at the position, nats, differentiable; `entropy_quantile` and `entropy_coef` need
            it.
        cp_group: context-parallel ranks over which responses are split. Every rank passes its own T tokens, the same
            number on each, and the same id for the same response.

    Returns:
        LossOutput: mean loss = `loss_sum / denominator`; both are 0 if no token is unmasked.

    Raises:
        ValueError: shapes or types differ, a tensor that the configuration needs is missing. Raised before any
            collective.

    Source: arXiv 2510.06062; the table of weights is in `megatron_aspo.loss.objectives`.
    """
    validation.check_tensors(logprobs=logprobs)
    validation.check_floating(logprobs=logprobs, entropy=entropy)
    if not logprobs.dim():
        raise ValueError("logprobs must be [..., T], not a scalar")
    validation.check_shapes(logprobs.shape, "that of logprobs", entropy=entropy)
    tokens = TokenBatch(None, loss_mask, advantages, old_logprobs, ref_logprobs, rollout_logprobs, sequence_ids)
    tokens.check(logprobs.shape, config, cp_group)
    if entropy is None and (config.entropy_coef != 0 or config.entropy_quantile is not None):
        raise ValueError("entropy is missing, but the configuration needs it (entropy_coef, entropy_quantile)")

    dtype = statistics_dtype(logprobs.dtype)
    now = logprobs.detach().reshape(-1).to(dtype)
    entropy_now = None if entropy is None else entropy.detach().reshape(-1).to(dtype)
    loss = TokenLoss.from_tokens(tokens.flattened(dtype), config, cp_group, now, entropy_now)
    output = loss.output(now, entropy_now, logprobs.shape)
    by_logprobs, by_entropy = loss.gradients(now, entropy_now)
    by_logprobs = by_logprobs.view_as(logprobs).to(logprobs.dtype)

    def backward(grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return grad * by_logprobs, None if by_entropy is None else grad * by_entropy.view_as(by_logprobs)

    return replace(output, loss_sum=WithGradients.apply(backward, output.loss_sum, logprobs, entropy))


class WithGradients(torch.autograd.Function):
    """A loss sum whose gradients were computed with it: `backward` maps the gradient in it to those in `inputs`."""

    @staticmethod
    def forward(ctx: Any, backward: Any, loss_sum: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.gradients = backward
        return loss_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the parameters' names)
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients(grad)
