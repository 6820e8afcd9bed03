"""Log-probs and entropy from vocab-parallel logits, in one pass and one collective."""
# torch.autograd's apply is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aspo.loss import softmax, truncation, validation
from megatron_aspo.loss.collectives import group_size


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    tp_group: dist.ProcessGroup | None,
    with_entropy: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    vocab_size: int | None = None,
    loss_mask: Tensor | None = None,
    overwrite_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature)[targets] and the softmax's entropy, the vocabulary split over ranks.

    Rank k of `tp_group` holds the logits of tokens [k V/tp, (k+1) V/tp). The forward pass makes one all-gather
    of 4 numbers per position; the backward pass makes none and recomputes the softmax piece by piece. Nothing of
    size [..., V/tp] is kept but the input and its gradient.

    With `top_k` or `top_p` the distribution is the sampler's truncated and renormalised one: first the k most
    probable tokens, of these the smallest set of the most probable whose mass reaches p. Tokens that tie with
    the last one kept are kept. A target outside has log-prob -inf and no gradient. `top_k` takes 4 further
    collectives, `top_p` 5.

    Args:
        logits: [..., V/tp], any floating type; statistics are float32 (float64 for float64).
        targets: [...], global token ids in [0, V).
        tp_group: the tensor-parallel group, or None when the vocabulary is whole.
        with_entropy: also return the entropy in nats, differentiable.
        temperature: > 0.
        top_k, top_p: truncation of the distribution, or None.
        vocab_size: V where the last entries of the logits only pad the vocabulary: they get no probability.
        loss_mask: [...]; where it is 0, targets may hold anything, and what is returned there means nothing.
        overwrite_logits: the backward pass writes the gradient over `logits`, for callers that read them nowhere
            else; else they are never changed.

    Returns:
        logprobs [...] and entropy [...] (None without `with_entropy`), float32 (float64 for float64), equal
        on all ranks of the group.

    Raises:
        ValueError: shapes, types, ids, the group or a number do not fit; before any collective.
    """
    validation.check_tensors(logits=logits, targets=targets)
    if not logits.dim():
        raise ValueError("logits must be [..., V/tp], not a scalar")
    validation.check_floating(logits=logits)
    validation.check_integers(targets=targets)
    reason = "that of logits without the vocabulary"
    validation.check_shapes(logits.shape[:-1], reason, targets=targets, loss_mask=loss_mask)
    validation.check_positive(temperature=temperature)
    truncation.check(top_k, top_p)
    validation.check_group("tp_group", tp_group)
    shard = logits.shape[-1]
    vocabulary = validation.check_vocab_size(vocab_size, shard, group_size(tp_group), "logits")
    if loss_mask is not None:
        targets = targets.masked_fill(loss_mask == 0, 0)
    validation.check_token_ids(targets, vocabulary)

    flat = logits.detach().reshape(-1, shard)[:, : softmax.real_columns(vocab_size, shard, tp_group)]
    local = softmax.local_targets(targets.reshape(-1), flat.shape[1], shard, tp_group)
    threshold = truncation.threshold(flat, tp_group, temperature, top_k, top_p)
    return _VocabParallelLogprobs.apply(
        logits,
        local.view(targets.shape),
        threshold,
        flat.shape[1],
        tp_group,
        with_entropy,
        temperature,
        overwrite_logits,
    )


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        threshold: Tensor | None,
        columns: int,
        tp_group: dist.ProcessGroup | None,
        with_entropy: bool,
        temperature: float,
        overwrite_logits: bool,
    ) -> tuple[Tensor, Tensor | None]:
        flat = logits.detach().reshape(-1, logits.shape[-1])[:, :columns]
        stats = softmax.statistics(flat, targets.reshape(-1), temperature, threshold)
        log_normalizer, entropy, logprobs = softmax.merge(softmax.gather(stats, tp_group))

        ctx.save_for_backward(logits, targets, threshold, log_normalizer, entropy, logprobs)
        ctx.columns, ctx.temperature, ctx.overwrite_logits = columns, temperature, overwrite_logits
        ctx.set_materialize_grads(False)
        return logprobs.view(targets.shape), entropy.view(targets.shape) if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the parameters' names)
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, targets, threshold, log_normalizer, entropy, logprobs = ctx.saved_tensors
        grad_logprobs, grad_entropy = (None if g is None else g.reshape(-1) for g in grads)
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 8
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        elif threshold is not None:  # a truncated target: -inf has no gradient
            grad_logprobs = grad_logprobs.masked_fill(logprobs == -torch.inf, 0.0)
        flat = logits.reshape(-1, logits.shape[-1])
        grad = flat if ctx.overwrite_logits else torch.empty_like(flat)
        grad[:, ctx.columns :] = 0.0
        softmax.gradient(
            flat[:, : ctx.columns],
            targets.reshape(-1),
            log_normalizer,
            grad_logprobs,
            grad[:, : ctx.columns],
            ctx.temperature,
            threshold,
            None if grad_entropy is None else entropy,
            grad_entropy,
        )
        return grad.view(logits.shape), None, None, None, None, None, None, None
