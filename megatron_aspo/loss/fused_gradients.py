"""The gradients of the fused head: accumulated chunk by chunk, handed to autograd or to Megatron's `main_grad`."""
# torch.distributed is not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.loss.collectives import group_size, reduce_scatter
from megatron_aspo.loss.output_layer import FLOAT32_PRODUCTS, OutputLayer, Sweep

_BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Bytes of a weight gradient's product that exist at once where a GEMM cannot add to float32."""


@dataclass
class FusedGradients:
    """The gradients of hidden states and weight, of the loss sum times `loss_scale`.

    Attributes:
        hidden_shape: [..., H], of the layer's input.
        by_states: [T, H], this tensor-parallel rank's part of the sum over ranks; None if it needs no gradient.
        by_weight: [V/tp, H] in float32 (float64 for float64); None if it needs no gradient.
        in_main_grad: `by_weight` is Megatron's gradient buffer.
    """

    layer: OutputLayer
    hidden_shape: torch.Size
    by_states: Tensor | None
    by_weight: Tensor | None
    in_main_grad: bool
    loss_scale: float | Tensor

    @staticmethod
    def from_inputs(hidden: Tensor, sweep: Sweep, loss_scale: float | Tensor) -> FusedGradients | None:
        """Empty gradients; None if neither input needs one."""
        weight = sweep.layer.weight
        if not (hidden.requires_grad or weight.requires_grad):
            return None
        main_grad: Tensor | None = getattr(weight, "main_grad", None) if weight.requires_grad else None
        # A 16-bit main_grad would round after every chunk.
        in_main_grad = main_grad is not None and main_grad.dtype == sweep.dtype
        by_weight = main_grad if in_main_grad else None
        if by_weight is None and weight.requires_grad:
            by_weight = torch.zeros(weight.shape, dtype=sweep.dtype, device=weight.device)
        by_states = torch.zeros_like(sweep.states) if hidden.requires_grad else None
        return FusedGradients(sweep.layer, hidden.shape, by_states, by_weight, in_main_grad, loss_scale)

    def add(self, sweep: Sweep, chunk: slice, grad_logits: Tensor) -> None:
        """Add a chunk, from the gradient of its logits [rows, columns]. Two GEMMs."""
        rows, chosen = sweep.rows, sweep.positions[chunk]
        if self.by_states is not None:
            self.by_states[chosen] = grad_logits @ rows
        if self.by_weight is not None:
            add_product(self.by_weight[: rows.shape[0]], grad_logits.t(), sweep.states[chosen])

    def backward(self, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients in hidden states and weight, from the gradient in the loss sum; handed over, not copied."""
        by_states, by_weight, self.by_states, self.by_weight = self.by_states, self.by_weight, None, None
        if by_states is None and by_weight is None:
            raise RuntimeError("backward through fused_linear_policy_loss a second time: its gradients are gone")
        if self.in_main_grad:
            _check_scale(grad, self.loss_scale)
            by_weight = _mark_added(self.layer.weight)
        elif by_weight is not None:
            by_weight = _scaled(by_weight, grad / self.loss_scale).to(self.layer.weight.dtype)
        if by_states is not None:
            by_states = self._reduced(_scaled(by_states, grad / self.loss_scale)).view(self.hidden_shape)
        return by_states, by_weight

    def _reduced(self, grad: Tensor) -> Tensor:
        """The sum over tensor-parallel ranks: whole, or under sequence parallelism this rank's part of the sequence."""
        if self.layer.sequence_parallel:
            return reduce_scatter(grad, self.layer.tp_group)
        if group_size(self.layer.tp_group) > 1:
            dist.all_reduce(grad, group=self.layer.tp_group)
        return grad


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. `total` may be float32 and the factors 16-bit.

    On a CPU, and on CUDA before torch 2.8, the product is then rounded to 16 bits before it is added.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and FLOAT32_PRODUCTS:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        rows = max(1, _BLOCK_BYTES.get(total.device.type, 1 << 28) // (b.shape[1] * b.element_size()))
        for start in range(0, total.shape[0], rows):
            total[start : start + rows] += a[start : start + rows] @ b


def _scaled(values: Tensor, factor: Tensor) -> Tensor:
    if not factor.is_cuda and factor == 1:  # on a GPU reading the value would cost more than multiplying
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
    """Megatron's protocol for a gradient that is in `main_grad` already. Returns the gradient for autograd.

    Megatron's hooks need some gradient of the weight's shape, which they ignore and drop: the weight itself costs no
    memory. If the embedding shares the weight (`zero_out_wgrad`), autograd's gradient is added too, so it must be None.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010  (an attribute that Megatron sets on parameters)
    if getattr(weight, "zero_out_wgrad", False):
        return None

    had_none = weight.grad is None

    def drop_stand_in() -> None:
        """Without Megatron's hooks the stand-in would stay, and a write to the gradient would change the weight."""
        if had_none:
            weight.grad = None

    engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportPrivateUsage]
    engine.queue_callback(drop_stand_in)  # at the end of the backward pass
    return weight.detach()
