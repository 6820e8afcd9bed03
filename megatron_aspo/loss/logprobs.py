"""Log-probs and entropy from vocab-parallel logits, in one pass and one collective."""
# torch.linalg and torch.distributed are not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 22
"""Default chunk: as many rows as give this many logits (16 MiB in float32)."""

_NEVER = -1e4
"""Stands for log 0: exp of it is 0 in float64 too, and 0 * _NEVER is 0 where 0 * -inf is NaN."""


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    tp_group: dist.ProcessGroup | None,
    with_entropy: bool = True,
    chunk_size: int | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature)[targets] and the softmax's entropy, the vocabulary split over ranks.

    Rank k of `tp_group` holds the logits of tokens [k V/tp, (k+1) V/tp). The forward pass makes one
    all-gather of 4 numbers per position (shard maximum, sum of exponentials, its first moment, target logit),
    merged as in flash-softmax; the backward pass makes none and recomputes the softmax chunk by chunk.
    Nothing of size [..., V] is kept but the input and its gradient.

    Args:
        logits: [..., V/tp], any floating type, never changed; statistics are float32 (float64 for float64).
        targets: [...], global token ids. Where a position is masked out later, any value may stand.
        tp_group: the tensor-parallel group, or None when the vocabulary is whole.
        with_entropy: also return the entropy in nats, differentiable.
        chunk_size: positions worked on at once; default: 4 Mi logits.
        temperature: > 0.

    Returns:
        logprobs [...] and entropy [...] (None without `with_entropy`), float32 (float64 for float64), equal
        on all ranks of the group.

    Raises:
        ValueError: shapes, types or the temperature do not fit.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets has shape {list(targets.shape)}, logits {list(logits.shape)}: expected {list(logits.shape[:-1])}"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integer token ids, not {targets.dtype}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, not {logits.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be >= 1")
    rows = chunk_size or max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return _VocabParallelLogprobs.apply(logits, targets, tp_group, with_entropy, rows, temperature)


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        tp_group: dist.ProcessGroup | None,
        with_entropy: bool,
        rows: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor | None]:
        flat = logits.detach().reshape(-1, logits.shape[-1])
        local_targets, owned = _local_targets(targets.reshape(-1), flat.shape[-1], tp_group)
        stats = torch.empty(4, flat.shape[0], dtype=_stats_dtype(logits), device=logits.device)
        for start in range(0, flat.shape[0], rows):
            chunk = slice(start, start + rows)
            stats[:, chunk] = _shard_statistics(flat[chunk], local_targets[chunk], temperature)
        stats[3].masked_fill_(~owned, 0.0)
        log_normalizer, entropy, logprobs = _merge(_gather(stats, tp_group))

        ctx.save_for_backward(logits, local_targets, owned, log_normalizer, entropy)
        ctx.rows, ctx.temperature = rows, temperature
        ctx.set_materialize_grads(False)
        return logprobs.view(targets.shape), entropy.view(targets.shape) if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the parameters' names)
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """d logprob/dz = onehot - p;  dH/dz = -p (log p + H); both divided by the temperature."""
        logits, local_targets, owned, log_normalizer, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = (None if g is None else g.reshape(-1) for g in grads)
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None, None
        flat = logits.reshape(-1, logits.shape[-1])
        grad_logits = torch.empty_like(flat)
        for start in range(0, flat.shape[0], ctx.rows):
            chunk = slice(start, start + ctx.rows)
            log_p = _tempered(flat[chunk], ctx.temperature).sub_(log_normalizer[chunk, None])
            p = log_p.exp()
            if grad_entropy is None:
                grad = p
            else:
                grad = log_p.clamp_(min=_NEVER).add_(entropy[chunk, None]).mul_(p).mul_(-grad_entropy[chunk, None])
            if grad_logprobs is not None:
                d = grad_logprobs[chunk].to(p.dtype)
                grad = p.mul_(-d[:, None]) if grad_entropy is None else grad.addcmul_(p, d[:, None], value=-1)
                at_target = torch.where(owned[chunk], d, 0.0)
                grad.scatter_add_(1, local_targets[chunk, None], at_target[:, None])
            grad_logits[chunk] = grad.div_(ctx.temperature) if ctx.temperature != 1 else grad
        return grad_logits.view(logits.shape), None, None, None, None, None


def _stats_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """A copy in the statistics' type, divided by the temperature; safe to overwrite."""
    copy = logits.to(_stats_dtype(logits), copy=True)
    return copy.div_(temperature) if temperature != 1 else copy


def _local_targets(targets: Tensor, vocab_shard: int, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Targets as indices into this rank's shard (0 where another rank owns them), and which ones it owns."""
    first = vocab_shard * (dist.get_rank(tp_group) if tp_group is not None else 0)
    local = targets - first
    owned = (local >= 0) & (local < vocab_shard)
    return local.masked_fill(~owned, 0).long(), owned


def _shard_statistics(logits: Tensor, local_targets: Tensor, temperature: float) -> Tensor:
    """[n, V/tp] -> [4, n]: m = max z, S = sum e^(z-m), Q = sum e^(z-m) (z-m), and the target's z."""
    z = _tempered(logits, temperature)
    target = z.gather(1, local_targets[:, None])[:, 0]
    # A shard may be all -inf (padded vocabulary): a finite maximum keeps -inf - max from becoming NaN.
    m = z.amax(-1).clamp(min=-1e30)
    z.sub_(m[:, None]).clamp_(min=_NEVER)
    e = z.exp()
    return torch.stack([m, e.sum(-1), torch.linalg.vecdot(e, z), target])


def _gather(stats: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """[4, n] of every rank -> [ranks, 4, n]: the one collective."""
    ranks = dist.get_world_size(tp_group) if tp_group is not None else 1
    if ranks == 1:
        return stats[None]
    gathered = stats.new_empty(ranks * 4, stats.shape[1])
    dist.all_gather_single(gathered, stats.contiguous(), group=tp_group)
    return gathered.view(ranks, 4, -1)


def _merge(shards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[ranks, 4, n] -> (log sum e^z, entropy, the target's log-prob), each [n]."""
    m, s, q, target = shards.unbind(1)
    top = m.amax(0)
    scale = (m - top).exp()
    total = (s * scale).sum(0)
    moment = ((q + s * (m - top)) * scale).sum(0)
    log_total = total.log()
    # Relative to the maximum: the logits' common offset must not eat the log-prob's digits.
    return top + log_total, log_total - moment / total, target.sum(0) - top - log_total
