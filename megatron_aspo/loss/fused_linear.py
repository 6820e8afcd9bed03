"""The policy loss straight from hidden states: logits, loss and gradients in one sweep over the tokens.

The gradient of every objective in a token's log-prob is known as soon as the log-prob is, so the gradients of
the hidden states and of the output weight can be made chunk by chunk while the loss is: no [T, V/tp] tensor ever
exists. Per chunk: one GEMM for the logits, their statistics, one small collective, the gradient in place of the
logits, two GEMMs. The backward pass scales what is there and hands it on.
"""
# torch.distributed is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aspo.config import PolicyLossConfig
from megatron_aspo.loss import softmax, validation
from megatron_aspo.loss.collectives import all_gather, group_size, reduce_scatter
from megatron_aspo.loss.tokens import PreparedLoss, ResponseTerms, TokenData, needs_all_logprobs
from megatron_aspo.types import LossOutput

CHUNK_SIZE = 1024
"""Default tokens per chunk: enough for the weight's gradient to be bound by arithmetic, not by its own traffic."""

_BLOCK_BYTES = 1 << 22
"""Size of the piece of a weight gradient that is made at once where a GEMM cannot add to float32 (16-bit on CPU)."""


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
    response_terms: ResponseTerms | None = None,
    loss_scale: float | Tensor = 1.0,
    allow_empty: bool = False,
) -> LossOutput:
    """`policy_loss` of softmax(hidden @ weight.T / temperature), without the logits.

    Equal to `policy_loss` on `vocab_parallel_logprobs` of the logits. Masked tokens cost nothing. Its memory beyond
    inputs and their gradients is one chunk of logits in the weight's type (on a GPU one in float32 and one in the
    weight's type), however many tokens there are. The gradients are made now if gradients are enabled; what they
    cost besides is a float32 gradient of the weight, unless the weight has a float32 `main_grad` (Megatron's
    gradient buffer): it is then added there, **during this call**, multiplied by `loss_scale`, and backward must be
    called with exactly that gradient.
    gspo, response_mean_is and `entropy_quantile` need log-probs of whole responses: without `response_terms` they
    take a first sweep for them, and so a fourth GEMM.

    Collectives: one per chunk over `tp_group` (all-gather of 4 numbers per token; one for all chunks where there is a
    first sweep); under sequence parallelism one all-gather of `hidden`; one over `cp_group` where something belongs to
    whole responses. Backward: the reduction of the gradient of `hidden`, nothing else.

    Args:
        hidden: [..., H]; with `sequence_parallel` this rank's 1/tp of the first dimension.
        weight: [V/tp, H], of hidden's type; rank k holds the rows of tokens [k V/tp, (k+1) V/tp).
        targets: [...] global token ids, of hidden's shape without H (with `sequence_parallel` the first dimension
            times tp). Masked slots may hold anything, and so may `hidden` there.
        old_logprobs, advantages, loss_mask, ref_logprobs, rollout_logprobs: of the shape of `targets`, as in
            `policy_loss`.
        sequence_ids, cp_group, response_terms, allow_empty: as in `policy_loss`.
        tp_group: the tensor-parallel group, or None when the vocabulary is whole. All its ranks pass the same tokens.
        sequence_parallel: `hidden` is split over `tp_group` along its first dimension.
        chunk_size: tokens worked on at once, at most.
        temperature: that of sampling, so that the trainer's distribution is the sampler's.
        vocab_size: V where the last rows of the weight only pad the vocabulary: they get no probability.
        loss_scale: what the loss sum will be multiplied by before backward (Megatron's `grad_scale_func`). Only
            needed with `main_grad`, and by float16, whose gradients it keeps from underflowing.

    Returns:
        LossOutput: mean loss = `loss_sum / denominator`; `logprobs` and `entropy` have the shape of `targets`, and
        are 0 where masked.

    Raises:
        ValueError: shapes, types, ids, groups or numbers do not fit; before any collective.
    """
    head = _Head.of(hidden, weight, targets, tp_group, sequence_parallel, chunk_size, temperature, vocab_size)
    data = TokenData.of(
        targets.shape,
        head.dtype,
        config,
        cp_group,
        allow_empty,
        loss_mask=loss_mask,
        advantages=advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        sequence_ids=sequence_ids,
    )
    if response_terms is not None:
        response_terms.check(config, targets.numel())
    validation.check_token_ids(targets.reshape(-1), head.vocabulary, data.mask)
    if isinstance(loss_scale, Tensor):  # on a GPU looking at its value would wait for it
        validation.check_shapes([1] * loss_scale.dim(), "one number", loss_scale=loss_scale)
    else:
        validation.check_positive(loss_scale=loss_scale)

    with_grad = torch.is_grad_enabled()
    with torch.no_grad():
        states = _States.of(head.all_states(hidden), data.mask)
        grads = _Gradients.wanted(hidden, weight, states, loss_scale) if with_grad else None
        local = head.local_targets(states.pick(targets.reshape(-1)))
        stats = _Statistics.empty(len(states), head.dtype, hidden.device)
        one_sweep = response_terms is not None or not needs_all_logprobs(config)
        if not one_sweep:
            head.first_sweep(states, local, stats)
        if response_terms is None:
            known = (None, None) if one_sweep else (states.spread(stats.logprobs), states.spread(stats.entropy))
            response_terms = ResponseTerms.of(data, config, cp_group, *known)
        loss = PreparedLoss.of(data, config, response_terms)
        tokens = loss.tokens if states.chosen is None else loss.tokens[states.chosen]
        if one_sweep or grads:
            for chunk, logits in head.sweep(states):
                if one_sweep:
                    stats.fill(chunk, softmax.statistics(logits, local[chunk], temperature), tp_group)
                if grads:
                    entropy = stats.entropy[chunk]
                    by_logprob, by_entropy = tokens[chunk].gradients(stats.logprobs[chunk], entropy, config)
                    softmax_grad = softmax.gradient(
                        logits,
                        local[chunk],
                        stats.log_normalizer[chunk],
                        by_logprob * loss_scale,
                        head.gradient_buffer(logits),
                        temperature,
                        None,
                        None if by_entropy is None else entropy,
                        None if by_entropy is None else by_entropy * loss_scale,
                    )
                    grads.add(softmax_grad, states, chunk, head)
        output = loss.output(states.spread(stats.logprobs), states.spread(stats.entropy), targets.shape)
    if not grads:
        return output
    loss_sum = _WithGradients.apply(output.loss_sum, hidden, weight, grads, tp_group, sequence_parallel)
    return replace(output, loss_sum=loss_sum)


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
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and the entropy, without gradient and without the logits: for old and reference
    policies. One collective over `tp_group` (and the gathering of sequence-parallel states).

    Args:
        loss_mask: [...]; where it is 0 nothing is computed: 0 is returned, and hidden and targets may hold anything.
        hidden, weight, targets, ...: as in `fused_linear_policy_loss`.

    Returns:
        logprobs, entropy: float32 (float64 for float64), of the shape of `targets`, 0 where masked.

    Raises:
        ValueError: as `fused_linear_policy_loss`.
    """
    head = _Head.of(hidden, weight, targets, tp_group, sequence_parallel, chunk_size, temperature, vocab_size)
    validation.check_shapes(targets.shape, "that of targets", loss_mask=loss_mask)
    mask = torch.ones_like(targets, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    validation.check_token_ids(targets, head.vocabulary, mask)
    states = _States.of(head.all_states(hidden), mask.reshape(-1))
    stats = _Statistics.empty(len(states), head.dtype, hidden.device)
    head.first_sweep(states, head.local_targets(states.pick(targets.reshape(-1))), stats)
    return states.spread(stats.logprobs).view(targets.shape), states.spread(stats.entropy).view(targets.shape)


@dataclass(frozen=True)
class _States:
    """The hidden states of the n tokens that count: nothing is computed for masked ones.

    Attributes:
        all: [T, H].
        chosen: [n] positions, the same on all tensor-parallel ranks; None if all T count.
    """

    all: Tensor
    chosen: Tensor | None

    @staticmethod
    def of(states: Tensor, mask: Tensor) -> _States:
        chosen = mask.nonzero()[:, 0]
        return _States(states, None if chosen.numel() == mask.numel() else chosen)

    def __len__(self) -> int:
        return self.all.shape[0] if self.chosen is None else self.chosen.numel()

    def __getitem__(self, chunk: slice) -> Tensor:
        """[rows, H]"""
        return self.all[chunk] if self.chosen is None else self.all[self.chosen[chunk]]

    def pick(self, values: Tensor) -> Tensor:
        """[T] -> [n]"""
        return values if self.chosen is None else values[self.chosen]

    def spread(self, values: Tensor) -> Tensor:
        """[n] -> [T], 0 where masked."""
        if self.chosen is None:
            return values
        return values.new_zeros(self.all.shape[0]).index_copy_(0, self.chosen, values)


@dataclass(frozen=True)
class _Statistics:
    """Of each token that counts, [n]."""

    log_normalizer: Tensor
    entropy: Tensor
    logprobs: Tensor

    @staticmethod
    def empty(count: int, dtype: torch.dtype, device: torch.device) -> _Statistics:
        return _Statistics(*torch.empty(3, count, dtype=dtype, device=device).unbind())

    def fill(self, chunk: slice, stats: Tensor, tp_group: dist.ProcessGroup | None) -> None:
        """From a chunk's statistics of this rank's shard: the one collective."""
        merged = softmax.merge(softmax.gather(stats, tp_group))
        for mine, values in zip((self.log_normalizer, self.entropy, self.logprobs), merged, strict=True):
            mine[chunk] = values


@dataclass(frozen=True)
class _Head:
    """The output layer of this rank, and how to sweep over it.

    Attributes:
        weight: [columns, H], the rows that are tokens, without padding.
        shard: V/tp, padding included.
        vocabulary: how many tokens can be targets.
        dtype: of statistics.
    """

    weight: Tensor
    shard: int
    vocabulary: int
    dtype: torch.dtype
    tp_group: dist.ProcessGroup | None
    sequence_parallel: bool
    chunk_size: int
    temperature: float

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tp_group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        chunk_size: int,
        temperature: float,
        vocab_size: int | None,
    ) -> _Head:
        validation.check_tensors(hidden=hidden, weight=weight, targets=targets)
        validation.check_floating(hidden=hidden, weight=weight)
        validation.check_integers(targets=targets)
        if hidden.dim() < 2:
            raise ValueError(f"hidden must be [..., H], not {hidden.dim()}-d")
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(f"weight must be [V/tp, {hidden.shape[-1]}] (hidden's last), not {list(weight.shape)}")
        if weight.dtype != hidden.dtype:
            raise ValueError(f"weight is {weight.dtype}, hidden {hidden.dtype}: they must have one type")
        validation.check_counts(chunk_size=chunk_size)
        validation.check_positive(temperature=temperature)
        validation.check_group("tp_group", tp_group)
        ranks = group_size(tp_group)
        if sequence_parallel and ranks == 1:
            raise ValueError("sequence_parallel=True needs a tp_group of more than one rank")
        whole = [hidden.shape[0] * (ranks if sequence_parallel else 1), *hidden.shape[1:-1]]
        reason = f"hidden's, its first dimension times {ranks} ranks of tp_group" if sequence_parallel else "hidden's"
        validation.check_shapes(whole, reason, targets=targets)
        shard = weight.shape[0]
        vocabulary = validation.check_vocab_size(vocab_size, shard, ranks, "weight")
        return _Head(
            weight.detach()[: softmax.real_columns(vocab_size, shard, tp_group)],
            shard,
            vocabulary,
            softmax.statistics_dtype(hidden.dtype),
            tp_group,
            sequence_parallel,
            chunk_size,
            temperature,
        )

    def all_states(self, hidden: Tensor) -> Tensor:
        """[T, H]: the hidden states of all tokens."""
        states = hidden.detach().reshape(-1, hidden.shape[-1])
        if not self.sequence_parallel:
            return states
        return all_gather(states, self.tp_group)

    def local_targets(self, targets: Tensor) -> Tensor:
        return softmax.local_targets(targets, self.weight.shape[0], self.shard, self.tp_group)

    def sweep(self, states: _States) -> Iterator[tuple[slice, Tensor]]:
        """(chunk, its logits [rows, columns]); the logits are valid until the next one, and free to be overwritten.

        On CUDA the GEMM's float32 sums are kept as they are; elsewhere they come in the weight's type.
        """
        tokens, weight = len(states), self.weight
        # Chunks of one size: a small last one would waste its GEMMs.
        rows = -(-tokens // -(-tokens // self.chunk_size)) if tokens else 0
        keep_sums = weight.is_cuda and weight.dtype != self.dtype
        buffer = weight.new_empty(rows, weight.shape[0], dtype=self.dtype if keep_sums else weight.dtype)
        for start in range(0, tokens, rows or 1):
            chunk = slice(start, min(start + rows, tokens))
            logits = buffer[: chunk.stop - start]
            if keep_sums:
                torch.mm(states[chunk], weight.t(), out_dtype=self.dtype, out=logits)
            else:
                torch.mm(states[chunk], weight.t(), out=logits)
            yield chunk, logits

    def gradient_buffer(self, logits: Tensor) -> Tensor:
        """Where the logits' gradient goes, in the weight's type: over the logits if they have it."""
        return logits if logits.dtype == self.weight.dtype else torch.empty_like(logits, dtype=self.weight.dtype)

    def first_sweep(self, states: _States, local: Tensor, stats: _Statistics) -> None:
        """Fill in the statistics of all tokens, with one collective for all chunks."""
        mine = torch.empty(4, len(states), dtype=self.dtype, device=self.weight.device)
        for chunk, logits in self.sweep(states):
            mine[:, chunk] = softmax.statistics(logits, local[chunk], self.temperature)
        stats.fill(slice(None), mine, self.tp_group)


@dataclass
class _Gradients:
    """The gradients of hidden states and weight, of the loss sum times `loss_scale`.

    Attributes:
        states: [T, H], this tensor-parallel rank's part of the sum over ranks; None where not wanted.
        weight: [V/tp, H] in float32 (float64 for float64); None where not wanted.
        in_main_grad: `weight` is Megatron's gradient buffer.
    """

    states: Tensor | None
    weight: Tensor | None
    in_main_grad: bool
    loss_scale: float | Tensor

    @staticmethod
    def wanted(hidden: Tensor, weight: Tensor, states: _States, loss_scale: float | Tensor) -> _Gradients | None:
        """None where no gradient is wanted at all."""
        if not (hidden.requires_grad or weight.requires_grad):
            return None
        dtype = softmax.statistics_dtype(weight.dtype)
        main_grad: Tensor | None = getattr(weight, "main_grad", None) if weight.requires_grad else None
        # A 16-bit main_grad would round after every chunk.
        in_main_grad = main_grad is not None and main_grad.dtype == dtype
        buffer = main_grad if in_main_grad else None
        if buffer is None and weight.requires_grad:
            buffer = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        by_states = None
        if hidden.requires_grad:
            by_states = torch.empty_like(states.all) if states.chosen is None else torch.zeros_like(states.all)
        return _Gradients(by_states, buffer, in_main_grad, loss_scale)

    def add(self, grad_logits: Tensor, states: _States, chunk: slice, head: _Head) -> None:
        """The two GEMMs of a chunk."""
        if self.states is not None:
            if states.chosen is None:
                torch.mm(grad_logits, head.weight, out=self.states[chunk])
            else:
                self.states[states.chosen[chunk]] = grad_logits @ head.weight
        if self.weight is not None:
            add_product(self.weight[: head.weight.shape[0]], grad_logits.t(), states[chunk])


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where `total` may be float32 and the factors 16-bit (then on a CPU the product is, too)."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        rows = max(1, _BLOCK_BYTES // (b.shape[1] * b.element_size()))
        for start in range(0, total.shape[0], rows):
            total[start : start + rows] += a[start : start + rows] @ b


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients in the hidden states and the weight are known already."""

    @staticmethod
    def forward(
        ctx: Any,
        loss_sum: Tensor,
        hidden: Tensor,
        weight: Tensor,
        grads: _Gradients,
        tp_group: dist.ProcessGroup | None,
        sequence_parallel: bool,
    ) -> Tensor:
        # Not saved tensors: these are the gradients themselves, and backward may write to them.
        ctx.grads, ctx.hidden_shape, ctx.weight = grads, hidden.shape, weight
        ctx.tp_group, ctx.sequence_parallel = tp_group, sequence_parallel
        return loss_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the parameters' names)
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads: _Gradients | None = ctx.grads
        if grads is None:
            raise RuntimeError("backward through fused_linear_policy_loss a second time: its gradients are gone")
        ctx.grads = None
        grad_hidden = grad_weight = None
        if grads.in_main_grad:
            _check_scale(grad, grads.loss_scale)
            grad_weight = _mark_added(ctx.weight)
        elif grads.weight is not None:
            grad_weight = _scaled(grads.weight, grad, grads.loss_scale).to(ctx.weight.dtype)
        if grads.states is not None:
            grad_hidden = _reduce(
                _scaled(grads.states, grad, grads.loss_scale), ctx.tp_group, ctx.sequence_parallel
            ).view(ctx.hidden_shape)
        return None, grad_hidden, grad_weight, None, None, None


def _scaled(values: Tensor, grad: Tensor, loss_scale: float | Tensor) -> Tensor:
    factor = grad / loss_scale
    if not factor.is_cuda and factor == 1:  # on a GPU looking would cost more than multiplying
        return values
    return values.mul_(factor)


def _check_scale(grad: Tensor, loss_scale: float | Tensor) -> None:
    message = (
        "the loss of fused_linear_policy_loss was scaled before backward, but the weight's gradient is in main_grad "
        "already: pass that factor as loss_scale (under Megatron-Core use calculate_per_token_loss=True)"
    )
    equal = grad == loss_scale
    if equal.is_cuda:
        # A check that does not wait for the GPU.
        torch._assert_async(equal, message)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    elif not equal:
        raise ValueError(f"{message}; loss_scale is {float(loss_scale):g}, the factor {float(grad):g}")


def _mark_added(weight: Tensor) -> Tensor | None:
    """Megatron's protocol for a gradient that is in `main_grad` already; what autograd is given instead.

    Its hooks want some gradient of the weight's shape, to be ignored and dropped: the weight itself costs nothing.
    Where the embedding shares the weight (`zero_out_wgrad`), autograd's gradient is added too, so ours must be none.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010  (an attribute that Megatron hangs on parameters)
    if getattr(weight, "zero_out_wgrad", False):
        return None

    had_none = weight.grad is None

    def drop_stand_in() -> None:
        """Without such hooks it would stay, and whoever wrote to the gradient would write to the weight."""
        if had_none:
            weight.grad = None

    engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportPrivateUsage]
    engine.queue_callback(drop_stand_in)  # at the end of the backward pass
    return weight.detach()


def _reduce(grad: Tensor, tp_group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """The sum over tensor-parallel ranks: whole, or this rank's part of the sequence."""
    ranks = group_size(tp_group)
    if ranks == 1:
        return grad
    if not sequence_parallel:
        dist.all_reduce(grad, group=tp_group)
        return grad
    return reduce_scatter(grad, tp_group)
