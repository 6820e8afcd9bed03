"""The policy loss of tokens whose log-probs are known."""
# torch.autograd's apply is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aspo.config import PolicyLossConfig
from megatron_aspo.loss import validation
from megatron_aspo.loss.softmax import statistics_dtype
from megatron_aspo.loss.tokens import PreparedLoss, ResponseTerms, TokenData
from megatron_aspo.types import LossOutput


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
    response_terms: ResponseTerms | None = None,
    allow_empty: bool = False,
) -> LossOutput:
    """The policy loss of a batch of tokens, with gradient -w(r, A) * A in each token's log-prob.

    All tensors share one shape [..., T]. Masked slots may hold anything, NaN included.

    Args:
        logprobs: log pi(token), natural logarithm; differentiable.
        old_logprobs: the same under the policy held fixed during the update; None takes `logprobs` itself
            (ratio 1: plain policy gradient; with advantages 1, supervised learning).
        advantages: one per token (outcome-supervised: equal within a response).
        loss_mask: bool, integer or float; non-zero marks response tokens.
        config: objective, clip ranges, aggregation, coefficients.
        entropy: the policy's entropy at the position, nats, differentiable; needed by `entropy_quantile` and
            `entropy_coef`.
        ref_logprobs: log-probs of the reference policy; needed by `kl_coef`.
        rollout_logprobs: log-probs by the sampling engine; their mismatch with `old_logprobs` is reported, and
            corrected as `rollout_*` of the configuration say.
        sequence_ids: non-negative integers that tell responses apart; default: each row is one response.
        cp_group: context-parallel ranks over which responses are split; every rank passes its own T tokens, the
            same number on each, and the same id for the same response.
        response_terms: from `response_terms_of`, where responses lie across micro-batches.
        allow_empty: take a batch whose mask selects nothing, as a schedule may hand it to a rank.

    Returns:
        LossOutput: mean loss = `loss_sum / denominator`.

    Raises:
        ValueError: shapes or types differ, an input that the configuration needs is missing, no token is selected;
            before any collective.

    Source: arXiv 2510.06062; the table of weights is in `megatron_aspo.loss.objectives`.
    """
    data, now, entropy_now = _token_data(
        logprobs,
        config,
        cp_group,
        allow_empty,
        entropy,
        old_logprobs=old_logprobs,
        advantages=advantages,
        loss_mask=loss_mask,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        sequence_ids=sequence_ids,
    )
    if response_terms is None:
        response_terms = ResponseTerms.of(data, config, cp_group, now, entropy_now)
    else:
        response_terms.check(config, now.numel())
    loss = PreparedLoss.of(data, config, response_terms)
    output = loss.output(now, entropy_now, logprobs.shape)
    grads = loss.tokens.gradients(now, entropy_now, config)
    return replace(output, loss_sum=_WithGradients.apply(output.loss_sum, logprobs, entropy, *grads))


def response_terms_of(
    micro_batches: Sequence[Mapping[str, Tensor | None]],
    config: PolicyLossConfig,
    cp_group: dist.ProcessGroup | None = None,
) -> list[ResponseTerms]:
    """What each micro-batch must know of responses that lie across several of them, as the turns of one trajectory may.

    Objectives and aggregations that look at whole responses are then exact. One small collective, over `cp_group`.

    Args:
        micro_batches: of each the tensors of `policy_loss` by name; `sequence_ids` is needed, and tells responses apart
            across micro-batches. gspo, response_mean_is and `entropy_quantile` need the current policy's `logprobs`
            and `entropy`, from a forward pass over all of them; others only look at the shape of `logprobs`.

    Returns:
        For each micro-batch the `response_terms` of its loss. Responses are counted with the first.

    Raises:
        ValueError: as `policy_loss`.
    """
    for tensors in micro_batches:
        if tensors.get("sequence_ids") is None:
            raise ValueError("sequence_ids is missing in a micro-batch: it tells responses apart across micro-batches")
    if len({tensors.get("old_logprobs") is None for tensors in micro_batches}) > 1:
        raise ValueError("old_logprobs is missing in some of the micro-batches only")
    parts = [
        _token_data(logprobs, config, cp_group, True, entropy, **tensors)
        for logprobs, entropy, tensors in map(_without_policy, micro_batches)
    ]
    if not parts:
        return []
    data = TokenData.concatenate([data for data, _, _ in parts])
    entropies = [entropy for _, _, entropy in parts if entropy is not None]
    whole = ResponseTerms.of(
        data, config, cp_group, torch.cat([now for _, now, _ in parts]), torch.cat(entropies) if entropies else None
    )
    return whole.split([now.numel() for _, now, _ in parts])


def _without_policy(
    tensors: Mapping[str, Tensor | None],
) -> tuple[Tensor, Tensor | None, dict[str, Tensor | None]]:
    others = dict(tensors)
    logprobs, entropy = others.pop("logprobs", None), others.pop("entropy", None)
    if logprobs is None:
        raise ValueError("logprobs is missing in a micro-batch")
    return logprobs, entropy, others


def _token_data(
    logprobs: Tensor,
    config: PolicyLossConfig,
    cp_group: dist.ProcessGroup | None,
    allow_empty: bool,
    entropy: Tensor | None,
    **tensors: Any,
) -> tuple[TokenData, Tensor, Tensor | None]:
    """Checked and flat: the tokens, their log-probs and entropy."""
    validation.check_tensors(logprobs=logprobs)
    validation.check_config(config)
    if not logprobs.is_floating_point() or logprobs.dim() == 0:
        raise ValueError(
            f"logprobs must be a floating-point tensor [..., T], not {logprobs.dtype} of {logprobs.dim()}-d"
        )
    validation.check_shapes(logprobs.shape, "that of logprobs", entropy=entropy)
    validation.check_floating(entropy=entropy)
    if entropy is None and (config.entropy_coef != 0 or config.entropy_quantile is not None):
        raise ValueError("entropy is missing, but the configuration needs it (entropy_coef, entropy_quantile)")
    dtype = statistics_dtype(logprobs.dtype)
    data = TokenData.of(logprobs.shape, dtype, config, cp_group, allow_empty, **tensors)
    flat_entropy = None if entropy is None else entropy.detach().reshape(-1).to(dtype)
    return data, logprobs.detach().reshape(-1).to(dtype), flat_entropy


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients in the log-probs and the entropy are known already."""

    @staticmethod
    def forward(
        ctx: Any,
        loss_sum: Tensor,
        logprobs: Tensor,
        entropy: Tensor | None,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(grad_logprobs.view_as(logprobs).to(logprobs.dtype), grad_entropy)
        ctx.shape = logprobs.shape
        return loss_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the parameters' names)
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = ctx.saved_tensors
        return (
            None,
            grad * grad_logprobs,
            None if grad_entropy is None else grad * grad_entropy.view(ctx.shape),
            None,
            None,
        )
