"""A softmax whose vocabulary is split over ranks: the statistics of a shard, their merge, and the gradient.

Rank k of a tensor-parallel group holds the logits of tokens [k V/tp, (k+1) V/tp). Per row four numbers describe
a shard: m = max z, S = sum e^(z-m), Q = sum e^(z-m) (z-m), and the target's z (0 on ranks that do not own it).
They merge as in flash-softmax. The merged numbers give the log-prob, the entropy, and all that the gradient needs, so
one small collective is enough.

`statistics` and `gradient` are the element-wise work. The versions here are plain torch, the reference; on CUDA each is
one Triton kernel (`megatron_aspo.loss.kernels`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.loss.collectives import all_gather, group_rank, group_size

KERNELS_VARIABLE = "MEGATRON_ASPO_KERNELS"
"""Environment variable: "auto" (Triton on CUDA), "torch", or "triton" (also on CPU, in Triton's interpreter)."""

NEVER = -1e4
"""Stands for log 0: exp of it is 0 in float64 too, and 0 * NEVER is 0 where 0 * -inf is NaN."""

LOWEST = -1e30
"""Stands for the maximum of a shard without a finite logit: with -inf, z - m would be NaN."""

_TILE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Logits worked on at once by the torch reference: what a core's cache holds, or enough to fill a GPU."""


def statistics(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """The four numbers (m, S, Q, target's z) of each row of a shard, where z = logits / temperature.

    Args:
        logits: [n, V/tp], any floating type; V/tp may be 0.
        targets: [n] int64, column of the target in this shard, -1 where another rank owns it.

    Returns:
        [4, n] float32 (float64 for float64).
    """
    if _use_triton(logits):
        from megatron_aspo.loss import kernels

        return kernels.statistics(logits, targets, temperature)
    out = torch.empty(4, logits.shape[0], dtype=statistics_dtype(logits.dtype), device=logits.device)
    if not logits.shape[1]:
        out.zero_()[0] = LOWEST
        return out
    for rows in _tiles(logits):
        z = _tempered(logits[rows], temperature)
        m, s, q, target = out[:, rows].unbind()
        own = targets[rows]
        target.copy_(torch.where(own >= 0, z.gather(1, own.clamp(min=0)[:, None])[:, 0], 0.0))
        torch.clamp(z.amax(-1), min=LOWEST, out=m)
        e = z.sub_(m[:, None]).exp()
        torch.sum(e, -1, out=s)
        torch.sum(z.clamp_(min=NEVER).mul_(e), -1, out=q)
    return out


def gradient(
    logits: Tensor,
    targets: Tensor,
    log_normalizer: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    out: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Fill `out` with the gradient of the logits: d logprob/dz = onehot - p;  d entropy/dz = -p (log p + H).

    Args:
        logits, targets, temperature: as in `statistics`.
        log_normalizer, entropy: [n], log sum e^z and H over the whole vocabulary.
        grad_logprobs, grad_entropy: [n], the loss's gradients in the targets' log-probs and in the entropy.
        out: [n, V/tp], any floating type, the elements of a row side by side; may be `logits` itself.
    """
    if _use_triton(logits):
        from megatron_aspo.loss import kernels

        return kernels.gradient(logits, targets, log_normalizer, entropy, grad_logprobs, grad_entropy, out, temperature)
    if not logits.shape[1]:
        return out
    for rows in _tiles(logits):
        z = _tempered(logits[rows], temperature)
        z.sub_(log_normalizer[rows, None])
        d = (grad_logprobs[rows] / temperature).to(z.dtype)
        if grad_entropy is None:
            grad = z.exp_().mul_(-d[:, None])
        else:
            p = z.exp()
            d_entropy = (grad_entropy[rows] / temperature).to(z.dtype)
            grad = z.clamp_(min=NEVER).add_(entropy[rows, None]).mul_(-d_entropy[:, None]).sub_(d[:, None]).mul_(p)
        own = targets[rows]
        grad.scatter_add_(1, own.clamp(min=0)[:, None], torch.where(own >= 0, d, 0.0)[:, None])
        out[rows] = grad
    return out


def gather(stats: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """[4, n] of every rank -> [ranks, 4, n]: the one collective."""
    if group_size(tp_group) == 1:
        return stats[None]
    return all_gather(stats, tp_group).view(group_size(tp_group), *stats.shape)


def merge(shards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[ranks, 4, n] -> (log sum e^z, entropy in nats, the target's log-prob), each [n]."""
    m, s, q, target = shards.unbind(1)
    top = m.amax(0)
    shift = (m - top).clamp(min=NEVER)  # a shard far below the top weighs nothing: 0 * shift must not be NaN
    scale = shift.exp()
    total = (s * scale).sum(0)
    moment = ((q + s * shift) * scale).sum(0)
    log_total = total.log()
    # Relative to the maximum: the logits' common offset must not eat the log-prob's digits.
    return top + log_total, log_total - moment / total, target.sum(0) - top - log_total


def local_targets(targets: Tensor, columns: int, vocab_shard: int, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Token ids -> columns of this rank's shard, of which `columns` are tokens; -1 where another rank owns them."""
    local = targets.long() - vocab_shard * group_rank(tp_group)
    return local.masked_fill((local < 0) | (local >= columns), -1)


def real_columns(vocab_size: int | None, vocab_shard: int, tp_group: dist.ProcessGroup | None) -> int:
    """How many of this rank's `vocab_shard` columns are tokens; the others pad the vocabulary."""
    if vocab_size is None:
        return vocab_shard
    return min(max(vocab_size - vocab_shard * group_rank(tp_group), 0), vocab_shard)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """A copy in the statistics' type, divided by the temperature; safe to overwrite."""
    z = logits.to(statistics_dtype(logits.dtype), copy=True)
    return z.div_(temperature) if temperature != 1 else z


def _tiles(logits: Tensor) -> Iterator[slice]:
    step = max(1, _TILE_ELEMENTS.get(logits.device.type, 1 << 24) // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], step):
        yield slice(start, min(start + step, logits.shape[0]))


def _use_triton(logits: Tensor) -> bool:
    choice = os.environ.get(KERNELS_VARIABLE, "auto")
    if choice not in ("auto", "torch", "triton"):
        raise ValueError(f"{KERNELS_VARIABLE}={choice!r} is not one of auto, torch, triton")
    if choice == "torch" or logits.dtype == torch.float64:
        return False
    return choice == "triton" or (logits.is_cuda and importlib.util.find_spec("triton") is not None)
