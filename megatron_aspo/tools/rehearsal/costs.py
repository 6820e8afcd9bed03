"""Seconds of a kernel by a roofline: its arithmetic or its memory traffic, whichever is slower.

Nothing here was measured. Each share of a peak is a pair, the best and the worst that training reaches, and so are the
seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from megatron_aspo.tools.rehearsal.shadows import tensors_in, written_by

aten = torch.ops.aten

_FREE = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.set_.source_Storage_storage_offset,
    aten.set_.source_Tensor,
    aten._unsafe_view.default,
    aten._assert_async.msg,
}

_OVERWRITES = {aten.copy_.default, aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor}
"""Operators that write their first tensor and do not read it."""


_BETWEEN_DEVICES = {aten.copy_.default: 1, aten._to_copy.default: 0}
"""Operators that may copy between host and device -> place of the source among their arguments."""


@dataclass(frozen=True)
class Costs:
    """A GPU's speeds, and the shares of them that kernels reach at best and at worst. All pairs are assumptions.

    Attributes:
        peak: bfloat16 operations per second; the peak of FP8 is twice that.
        bandwidth: bytes per second of its memory.
        gemm: share of `peak` for products of the sizes of a large model. Small products are bound by `memory` or
            `launch`.
        gemm_fp8: share of twice `peak`; quantization is a kernel of its own.
        attention: share of `peak`. FlashAttention-2 reaches 0.35 on an H100, and FlashAttention-3 up to 0.75 forward
            (arXiv:2407.08608); backward is slower.
        memory: share of `bandwidth`.
        launch: the least seconds that a kernel takes.
        transfer: bytes per second between host and GPU by PCIe 5 x16; its nominal 64 GB/s are not reached.
        host: bytes per second of host memory for one rank, of 77 GB/s nominal (two sockets with eight channels of
            DDR5-4800 for eight ranks).
    """

    peak: float
    bandwidth: float
    gemm: tuple[float, float] = (0.75, 0.55)
    gemm_fp8: tuple[float, float] = (0.65, 0.4)
    attention: tuple[float, float] = (0.6, 0.35)
    memory: tuple[float, float] = (0.9, 0.7)
    launch: tuple[float, float] = (2e-6, 6e-6)
    transfer: tuple[float, float] = (50e9, 25e9)
    host: tuple[float, float] = (60e9, 30e9)

    @cached_property
    def _speeds(self) -> list[dict[str, tuple[float, float]]]:
        """At best and at worst: kind -> operations and bytes per second."""
        return [
            {
                "gemm": (self.peak * self.gemm[end], self.bandwidth * self.memory[end]),
                "gemm_fp8": (2 * self.peak * self.gemm_fp8[end], self.bandwidth * self.memory[end]),
                "attention": (self.peak * self.attention[end], self.bandwidth * self.memory[end]),
                "elementwise": (math.inf, self.bandwidth * self.memory[end]),
                "transfer": (math.inf, self.transfer[end]),
                "host": (math.inf, self.host[end]),
            }
            for end in (0, 1)
        ]

    def seconds(self, kind: str, flops: float, moved: int) -> tuple[float, float]:
        """Least and most seconds of a kernel, or (kind "host") of an operator on the host."""
        (fast, near), (slow, far) = (speeds[kind] for speeds in self._speeds)
        return max(self.launch[0], flops / fast, moved / near), max(self.launch[1], flops / slow, moved / far)

    def of_operator(
        self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]
    ) -> tuple[str, float, int] | None:
        """(kind, operations, bytes) of an operator of torch's; None if it starts no kernel."""
        if func.is_view or func in _FREE:
            return None
        place = _BETWEEN_DEVICES.get(func)
        if place is not None and args[place].device.type != out.device.type:
            return "transfer", 0.0, bytes_touched(args[place])
        written = list(tensors_in(out)) or written_by(func, args, kwargs)  # operators on lists return nothing
        moved = sum(map(bytes_touched, tensors)) + sum(map(bytes_touched, written))
        if func in _OVERWRITES:
            moved -= bytes_touched(args[0])
        count = flop_registry.get(func.overloadpacket)
        if count is None:
            return "elementwise", 0.0, moved
        return "gemm", float(count(*tensors_in(args), out_val=out)), moved


def bytes_touched(tensor: Tensor) -> int:
    """Bytes read or written of a tensor; an expanded dimension is read once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size
