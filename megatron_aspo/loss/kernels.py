"""`softmax.statistics` and `softmax.gradient` as one Triton kernel each, with the definitions of that module.

One program per row walks over the row's columns in tiles. Both kernels are bound by memory: the statistics read
the logits once, the gradient reads them once and writes its output once, in place if `out` is the logits.

Only `softmax` imports this module, and only to launch a kernel: the library itself does not need Triton.
"""
# Triton is not annotated, kernels are not Python, and a launch takes options beside the kernel's parameters.
# pyright: basic, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-1e30)  # these two as in the reference
NEVER = tl.constexpr(-1e4)

WARPS = 4
TILE = 2048
"""Columns at once: 16 a thread, in two to four 16-byte loads. A thread takes 32 to 72 registers, so 7 to 16 rows
share a multiprocessor and hide one another's waiting. Few warps and a small tile keep a row's fixed costs low (the
last, partial tile; merging the threads' statistics), which count in a shard of 16,000 columns."""


def statistics(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """[4, n] float32, for logits of at most 32 bits."""
    logits = _rowwise(logits)
    n, columns = logits.shape
    out = torch.empty(4, n, dtype=torch.float32, device=logits.device)
    vector = 16 // logits.element_size()
    threads = 32 * WARPS
    tile = {"UNROLL": TILE // (threads * vector), "THREADS": threads, "VECTOR": vector, "num_warps": WARPS}
    arguments = (logits, logits.stride(0), columns, targets.contiguous(), float(temperature), out, n)
    with torch.cuda.device_of(logits):
        _statistics[(n,)](*arguments, TEMPERED=temperature != 1, **tile)
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
    """Fills and returns `out`; computed in float32, for logits of at most 32 bits."""
    logits = _rowwise(logits)
    n, columns = logits.shape
    # contiguous: autograd's gradients may be expanded scalars.
    vectors = (targets, log_normalizer, entropy, grad_logprobs, grad_entropy)
    contiguous = (None if vector is None else vector.contiguous() for vector in vectors)
    arguments = (logits, logits.stride(0), columns, *contiguous, float(temperature), out, out.stride(0))
    with torch.cuda.device_of(logits):
        _gradient[(n,)](*arguments, TEMPERED=temperature != 1, TILE=TILE, num_warps=WARPS)
    return out


def _rowwise(logits: Tensor) -> Tensor:
    """Rows may lie apart, as in a slice of padded logits; the kernels want each row's columns side by side."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


@triton.jit
def _tempered(z, temperature, TEMPERED: tl.constexpr):
    """z / temperature, correctly rounded, in float32.

    Triton's / is approximate, and its div_rn takes more instructions than all the rest. The remainder of the
    approximate quotient, which a fused multiply-add leaves exact, corrects it (Markstein); inf has none.
    """
    z = z.to(tl.float32)
    if TEMPERED:
        reciprocal = tl.div_rn(1.0, temperature)  # the compiler moves it out of the loop
        quotient = z * reciprocal
        corrected = tl.fma(tl.fma(-quotient, temperature, z), reciprocal, quotient)
        z = tl.where(tl.abs(quotient) < float("inf"), corrected, quotient)
    return z


@triton.jit
def _include(m, s, q, z):
    """Statistics [THREADS] of what has been read, and a tile z [UNROLL, THREADS, VECTOR] -> those of both."""
    top = tl.maximum(m, tl.max(tl.max(z, 2), 0))
    z = z - top[None, :, None]
    e = tl.exp(z)
    # At least NEVER: s may be large, and s * shift must not overflow where the scale is 0 anyway.
    shift = tl.maximum(m - top, NEVER)
    scale = tl.exp(shift)
    q = (q + s * shift) * scale + tl.sum(tl.sum(tl.maximum(z, NEVER) * e, 2), 0)
    s = s * scale + tl.sum(tl.sum(e, 2), 0)
    return top, s, q


@triton.jit
def _statistics(
    logits,
    stride,
    columns,
    targets,
    temperature,
    out,
    n,
    TEMPERED: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows * stride may pass 2^31
    logits += row * stride
    # Read before the loop: at its end the row would wait for it.
    target = tl.load(targets + row)
    target_z = _tempered(tl.load(logits + target, mask=target >= 0, other=0.0), temperature, TEMPERED)
    # The tile's shape defines the threads' loads: VECTOR neighbours are one thread's 16-byte load. Each thread keeps
    # the statistics of its own loads, and threads need not wait for one another before the row's end.
    column = tl.arange(0, UNROLL)[:, None, None] * THREADS + tl.arange(0, THREADS)[None, :, None]
    column = column * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    m = tl.full([THREADS], LOWEST, tl.float32)  # not -inf, so that m - m is 0
    s = tl.zeros([THREADS], tl.float32)
    q = tl.zeros([THREADS], tl.float32)
    # Whole tiles without a mask, which would split the vector loads where `columns` is odd and the stride is not.
    whole = columns // (UNROLL * THREADS * VECTOR) * (UNROLL * THREADS * VECTOR)
    for start in range(0, whole, UNROLL * THREADS * VECTOR):
        z = tl.load(logits + start + column)
        m, s, q = _include(m, s, q, _tempered(z, temperature, TEMPERED))
    if whole < columns:
        z = tl.load(logits + whole + column, mask=whole + column < columns, other=float("-inf"))
        m, s, q = _include(m, s, q, _tempered(z, temperature, TEMPERED))
    top = tl.max(m, 0)
    shift = tl.maximum(m - top, NEVER)
    scale = tl.exp(shift)
    out += row
    tl.store(out, top)
    tl.store(out + n, tl.sum(s * scale, 0))
    tl.store(out + 2 * n, tl.sum((q + s * shift) * scale, 0))
    tl.store(out + 3 * n, tl.where(target >= 0, target_z, 0.0))


@triton.jit
def _gradient(
    logits,
    stride,
    columns,
    targets,
    log_normalizer,
    entropy,
    grad_logprobs,
    grad_entropy,
    temperature,
    out,
    out_stride,
    TEMPERED: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    out += row * out_stride
    target = tl.load(targets + row).to(tl.int32)
    log_normalizer = tl.load(log_normalizer + row).to(tl.float32)
    grad_logprobs = tl.div_rn(tl.load(grad_logprobs + row).to(tl.float32), temperature)
    entropy = tl.load(entropy + row).to(tl.float32)
    if grad_entropy is not None:
        grad_entropy = tl.div_rn(tl.load(grad_entropy + row).to(tl.float32), temperature)
    whole = columns // TILE * TILE
    for start in range(0, whole, TILE):
        column = start + tl.arange(0, TILE)
        z = _tempered(tl.load(logits + column), temperature, TEMPERED) - log_normalizer
        grad = _gradient_of(z, column == target, grad_logprobs, entropy, grad_entropy)
        tl.store(out + column, grad.to(out.dtype.element_ty))
    if whole < columns:
        column = whole + tl.arange(0, TILE)
        inside = column < columns
        z = _tempered(tl.load(logits + column, mask=inside), temperature, TEMPERED) - log_normalizer
        grad = _gradient_of(z, column == target, grad_logprobs, entropy, grad_entropy)
        tl.store(out + column, grad.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_of(log_p, is_target, d, entropy, d_entropy):
    slope = -d
    if d_entropy is not None:
        slope -= (tl.maximum(log_p, NEVER) + entropy) * d_entropy
    return slope * tl.exp(log_p) + tl.where(is_target, d, 0.0)
