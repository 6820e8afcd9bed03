"""Functions over lists of tensors: FusedAdam, the norm and the clipping of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from te_reference.registry import kernel


@kernel
def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], scale: float
) -> None:
    """[sources, targets]: target = source · scale, in float32, rounded once; `noop_flag` becomes 1 if a product is not
    finite. Source: csrc/extensions/multi_tensor/scale.cpp."""
    for source, target in zip(*tensor_lists, strict=True):
        value = source.float() * scale
        if not bool(value.isfinite().all()):
            noop_flag.fill_(1)
        target.copy_(value)


@kernel
def multi_tensor_scale_tensor(
    chunk_size: int, is_infinite: Tensor, tensor_lists: Sequence[Sequence[Tensor]], scale: Tensor
) -> None:
    """`multi_tensor_scale` by a factor on the device."""
    multi_tensor_scale(chunk_size, is_infinite, tensor_lists, float(scale))


@kernel
def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool | None = False
) -> tuple[Tensor, Tensor]:
    """[tensors] -> their common norm [1], and the norm of each or nothing; float32. Source:
    csrc/extensions/multi_tensor/l2norm.cpp."""
    norms = torch.stack([x.float().norm() for x in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)


@kernel
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Sequence[Any]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """One Adam step on [gradients, parameters, first moments, second moments, optionally float32 masters].

    Everything is computed in float32. Moments are rounded to their type after they served the update. With masters the
    parameter is the rounded master. `noop_flag` set: nothing happens.

    Args:
        mode: 0 adds the weight decay to the gradient (L2), 1 to the update (AdamW).

    Source: csrc/extensions/multi_tensor/adam.cpp, common/multi_tensor/adam.cu.
    """
    if bool(noop_flag.item()):
        return
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    for g, p, m, v, *master in zip(*tensor_lists, strict=True):
        weight = master[0] if master else p
        gradient, w = g.float(), weight.float()
        if mode == 0:
            gradient = gradient + weight_decay * w
        first = beta1 * m.float() + (1 - beta1) * gradient
        second = beta2 * v.float() + (1 - beta2) * gradient * gradient
        update = (first / correction1) / ((second / correction2).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * w
        m.copy_(first)
        v.copy_(second)
        weight.copy_(w - lr * update)
        if master:
            p.copy_(weight)
