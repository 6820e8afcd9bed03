"""The policy loss straight from hidden states: logits, loss and gradients in one sweep over the tokens.

The gradient of every objective in a token's log-prob is known as soon as the log-prob is. The gradients of hidden
states and output weight are therefore computed chunk by chunk with the loss, and no [T, V/tp] tensor ever exists. A
chunk takes one GEMM for the logits, their statistics, one small collective, the gradient in place of the logits, and
two GEMMs. The backward pass only scales the gradients and hands them on.
"""

# torch.autograd's apply is not annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.loss import validation
from megatron_aspo.loss.fused_gradients import FusedGradients
from megatron_aspo.loss.output_layer import OutputLayer
from megatron_aspo.loss.policy_loss import WithGradients
from megatron_aspo.loss.token_loss import LossOutput, TokenLoss, needs_all_logprobs
from megatron_aspo.loss.tokens import TokenBatch

CHUNK_SIZE = 1024
"""Default tokens per chunk: enough for the weight's gradient to be bound by arithmetic, not by its own traffic."""


def fused_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    config: PolicyLossConfig,
    tp_group: dist.ProcessGroup | None = None,
    *,
    sequence_parallel: bool = False,
    cp_group: dist.ProcessGroup | None = None,
    chunk_size: int = CHUNK_SIZE,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    positions: Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
) -> LossOutput:
    """`policy_loss` of softmax(hidden @ weight.T / temperature), without the logits.

    Equal to `policy_loss` on `vocab_parallel_logprobs` of the logits. Masked tokens cost nothing. Its memory beyond
    inputs and their gradients is one chunk of logits in the weight's type, on a GPU also one in float32.

    If gradients are enabled, they are computed during this call, the weight's in float32. If the weight has a float32
    `main_grad` (Megatron's gradient buffer), its gradient times `loss_scale` is added there **during this call**, and
    backward must be called with exactly that factor.

    Objectives with a ratio of whole responses, and `entropy_quantile`, need the log-probs of all tokens first: a first
    sweep computes them, which costs a fourth GEMM.

    Collectives: one per chunk over `tp_group` (all-gather of 4 numbers per token; one for all chunks of a first sweep);
    under sequence parallelism one all-gather of `hidden`; one over `cp_group` if the configuration needs whole
    responses. Backward: the reduction of the gradient of `hidden`, nothing else.

    Args:
        hidden: [..., H]; with `sequence_parallel` this rank's 1/tp of the first dimension.
        weight: [V/tp, H], of hidden's type; rank k holds the rows of tokens [k V/tp, (k+1) V/tp).
        targets, old_logprobs, advantages, loss_mask, ref_logprobs, rollout_logprobs, sequence_ids, positions: see
            `TokenBatch`. Their shape is hidden's without H (with `sequence_parallel` the first dimension times tp).
            `hidden` may hold anything where masked.
        config, cp_group: as in `policy_loss`.
        tp_group: the tensor-parallel group, or None if the vocabulary is whole. All its ranks pass the same tokens.
        sequence_parallel: `hidden` is split over `tp_group` along its first dimension.
        chunk_size: the largest number of tokens whose logits exist at once.
        temperature: of the sampling distribution, so that the trainer's distribution is the sampler's.
        vocab_size: V if the last rows of the weight only pad the vocabulary: they get no probability.
        loss_scale: the factor of the loss sum before backward (Megatron's `grad_scale_func`). Only needed with
            `main_grad`, and by float16, whose gradients it keeps from underflowing.

    Raises:
        ValueError: shapes, types, ids, groups or numbers do not fit. Raised before any collective.
    """
    layer = OutputLayer(weight, tp_group, sequence_parallel, chunk_size, temperature, vocab_size)
    tokens = TokenBatch(
        targets, loss_mask, advantages, old_logprobs, ref_logprobs, rollout_logprobs, sequence_ids, positions
    )
    vocabulary = layer.check(hidden, targets)
    tokens.check(targets.shape, config, cp_group)
    if not isinstance(loss_scale, Tensor):  # on a GPU reading its value would wait for it
        validation.check_positive("loss_scale", loss_scale)
    positions = validation.find_positions(loss_mask, targets, vocabulary, positions)

    with_grad = torch.is_grad_enabled()
    with torch.no_grad():
        sweep = layer.sweep(hidden, targets, positions)
        grads = FusedGradients.from_inputs(hidden, sweep, loss_scale) if with_grad else None
        one_sweep = not needs_all_logprobs(config)
        if one_sweep:
            stats = torch.empty(3, len(positions), dtype=sweep.dtype, device=hidden.device)
            logprobs = entropy = None
        else:
            stats = sweep.statistics()
            entropy, logprobs = sweep.spread(stats[1]), sweep.spread(stats[2])
        loss = TokenLoss.from_tokens(tokens.flattened(sweep.dtype), config, cp_group, logprobs, entropy)
        unmasked = loss[positions]
        for chunk, logits in sweep.logits() if one_sweep or grads else ():
            if one_sweep:
                stats[:, chunk] = sweep.merge(sweep.local_statistics(chunk, logits))
            if grads:
                by_logprob, by_entropy = unmasked[chunk].gradients(stats[2, chunk], stats[1, chunk])
                by_entropy = None if by_entropy is None else by_entropy * loss_scale
                grad_logits = sweep.gradient(chunk, logits, stats[:, chunk], by_logprob * loss_scale, by_entropy)
                grads.add(sweep, chunk, grad_logits)
        output = loss.output(sweep.spread(stats[2]), sweep.spread(stats[1]), targets.shape)
    if grads is None:
        return output
    return replace(output, loss_sum=WithGradients.apply(grads.backward, output.loss_sum, hidden, weight))


@torch.no_grad()
def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    *,
    sequence_parallel: bool = False,
    chunk_size: int = CHUNK_SIZE,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    loss_mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and the entropy, without gradient and without the logits: for old and reference
    policies. One collective over `tp_group` (and the gathering of sequence-parallel states).

    Arguments and errors are those of `fused_linear_policy_loss`. Without `loss_mask` every token counts.

    Returns:
        logprobs, entropy: float32 (float64 for float64), of the shape of `targets`, 0 where masked.
    """
    layer = OutputLayer(weight, tp_group, sequence_parallel, chunk_size, temperature, vocab_size)
    vocabulary = layer.check(hidden, targets)
    validation.check_shapes(targets.shape, "that of targets", loss_mask=loss_mask)
    positions = validation.find_positions(loss_mask, targets, vocabulary, positions)
    sweep = layer.sweep(hidden, targets, positions)
    _, entropy, logprobs = sweep.statistics()
    return sweep.spread(logprobs).view(targets.shape), sweep.spread(entropy).view(targets.shape)
