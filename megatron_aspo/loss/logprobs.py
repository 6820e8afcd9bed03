"""Log-probs and entropy from vocab-parallel logits, in one pass and one collective."""
# torch.autograd's apply is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aspo.loss import softmax, validation
from megatron_aspo.loss.collectives import group_size


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    tp_group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    loss_mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[targets] and the softmax's entropy, the vocabulary split over ranks.

    Rank k of `tp_group` holds the logits of tokens [k V/tp, (k+1) V/tp). The forward pass makes one all-gather of 4
    numbers per position, the backward pass none. Nothing of size [..., V/tp] is kept but the input and its gradient.

    Args:
        logits: [..., V/tp], any floating type; statistics are float32 (float64 for float64).
        targets: [...], global token ids in [0, V).
        tp_group: the tensor-parallel group, or None if the vocabulary is whole.
        temperature: > 0.
        vocab_size: V if the last entries of the logits only pad the vocabulary: they get no probability.
        loss_mask: [...]; where it is 0, targets may hold anything, and the results have no meaning.
        positions: see `TokenBatch`; with them targets are not checked to be token ids, which waits for a GPU.

    Returns:
        logprobs [...] and entropy [...] in nats, both differentiable, float32 (float64 for float64), equal on all
        ranks of the group.

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
    validation.check_positive("temperature", temperature)
    validation.check_group("tp_group", tp_group)
    shard = logits.shape[-1]
    vocabulary = validation.check_vocab_size(vocab_size, shard, group_size(tp_group), "logits")
    validation.find_positions(loss_mask, targets, vocabulary, positions)
    if loss_mask is not None:
        targets = targets.masked_fill(loss_mask == 0, 0)
    columns = softmax.real_columns(vocab_size, shard, tp_group)
    local = softmax.local_targets(targets, columns, shard, tp_group)
    return _VocabParallelLogprobs.apply(logits, local, columns, tp_group, temperature)


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        columns, tp_group, temperature = options
        flat = logits.detach().reshape(-1, logits.shape[-1])[:, :columns]
        stats = softmax.statistics(flat, targets.reshape(-1), temperature)
        log_normalizer, entropy, logprobs = softmax.merge(softmax.gather(stats, tp_group))

        ctx.save_for_backward(logits, targets, log_normalizer, entropy)
        ctx.columns, ctx.temperature = columns, temperature
        ctx.set_materialize_grads(False)
        return logprobs.view(targets.shape), entropy.view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the parameters' names)
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, targets, log_normalizer, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = (None if g is None else g.reshape(-1) for g in grads)
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 5
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        flat = logits.reshape(-1, logits.shape[-1])
        grad = flat.new_empty(flat.shape)
        grad[:, ctx.columns :] = 0.0
        softmax.gradient(
            flat[:, : ctx.columns],
            targets.reshape(-1),
            log_normalizer,
            entropy,
            grad_logprobs,
            grad_entropy,
            grad[:, : ctx.columns],
            ctx.temperature,
        )
        return grad.view(logits.shape), *(None,) * 4
