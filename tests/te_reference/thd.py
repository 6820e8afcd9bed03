"""Packed streams in ring attention: halves of sequences, and sums of partial results.

Under context parallelism a rank's part of a stream has two chunks of every sequence, an early one and a late one, so
`cu_seqlens` of the part bound sequences whose halves are these chunks. Source: csrc/extensions/attention.cpp,
common/fused_attn/context_parallel.cu.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from te_reference.registry import kernel


def _rows(cu_seqlens: Tensor, pick: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """Indices into a stream: the part (start, end) that `pick` chooses of each sequence (start, end)."""
    return torch.cat([torch.arange(*pick(s, e)) for s, e in itertools.pairwise(cu_seqlens.tolist())])


def _first_halves(cu_seqlens: Tensor) -> Tensor:
    return _rows(cu_seqlens, lambda s, e: (s, (s + e) // 2))


def _second_halves(cu_seqlens: Tensor) -> Tensor:
    return _rows(cu_seqlens, lambda s, e: ((s + e) // 2, e))


@kernel
def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half_idx: int) -> Tensor:
    """[t, h, d] or [2, t, h, d] -> the first (0) or second (1) halves of all sequences, [t / 2, h, d] or
    [2, t / 2, h, d]."""
    index = _second_halves(cu_seqlens) if half_idx else _first_halves(cu_seqlens)
    return tensor.index_select(tensor.dim() - 3, index)


@kernel
def thd_second_half_lse_correction(lse: Tensor, lse_per_step: Tensor, cu_seqlens: Tensor, lse_packed: bool) -> None:
    """Add a step's log-sum-exps [h, t / 2] to those of the second halves of `lse` [h, t], in place."""
    assert lse_packed
    index = _second_halves(cu_seqlens)
    lse[:, index] = torch.logaddexp(lse[:, index], lse_per_step[:, : len(index)].to(lse.dtype))


@kernel
def thd_read_second_half_lse(lse: Tensor, cu_seqlens: Tensor, lse_packed: bool, second_half_lse_seqlen: int) -> Tensor:
    """[h, t] -> the second halves, [h, `second_half_lse_seqlen`]; the rest is 0."""
    assert lse_packed
    half = lse[:, _second_halves(cu_seqlens)]
    return torch.nn.functional.pad(half, (0, second_half_lse_seqlen - half.shape[1]))


@kernel
def thd_out_correction(
    out: Tensor,
    out_per_step: Tensor,
    old_lse: Tensor,
    lse: Tensor,
    lse_per_step: Tensor,
    cu_seqlens: Tensor,
    only_second_half: bool,
    lse_packed: bool,
) -> None:
    """One step of an online softmax, in place: out [t, h, d] becomes out · exp(old lse - lse) + step · exp(step's lse -
    lse), with lse [h, t]. The step has all tokens, or those of the second halves."""
    assert lse_packed
    index = _second_halves(cu_seqlens) if only_second_half else torch.arange(int(cu_seqlens[-1]))
    count = len(index)
    kept = torch.exp(old_lse[:, index] - lse[:, index]).t()[..., None]
    added = torch.exp(lse_per_step[:, :count] - lse[:, index]).t()[..., None]
    step = out_per_step.view(-1, *out.shape[1:])[:count]
    out[index] = (out[index].float() * kept + step.float() * added).to(out.dtype)


@kernel
def thd_grad_correction(
    grad: Tensor, grad_per_step: Tensor, cu_seqlens: Tensor, first_half: str, second_half: str
) -> None:
    """Combine a step's gradient with the sum so far, in place: each half is "add"ed, "copy"ed or left ("none").

    Args:
        grad: [t, h, d] or [2, t, h, d].
        grad_per_step: the same shape, or half the tokens if one half is left.
    """
    axis = grad.dim() - 3
    both = first_half != "none" and second_half != "none"
    for action, index in ((first_half, _first_halves(cu_seqlens)), (second_half, _second_halves(cu_seqlens))):
        if action == "none":
            continue
        source = grad_per_step.index_select(axis, index) if both else grad_per_step.narrow(axis, 0, len(index))
        combine = {"add": grad.index_add_, "copy": grad.index_copy_}[action]
        combine(axis, index, source.to(grad.dtype))
