"""The output layer of this rank, and the sweep over the logits of the unmasked tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.loss import softmax, validation
from megatron_aspo.loss.collectives import all_gather, group_size

FLOAT32_PRODUCTS = "dtype_out" in torch.ops.aten.mm.overloads()
"""Whether a GEMM of 16-bit factors can write float32 on CUDA (`mm(out_dtype=)`, torch 2.8). Before, logits and the
products for the weight's gradient are rounded to the weight's type, as they are on a CPU."""


@dataclass(frozen=True)
class OutputLayer:
    """The output layer of this rank and the options of the sweep over its logits, as `fused_linear_policy_loss` takes
    them."""

    weight: Tensor
    tp_group: dist.ProcessGroup | None
    sequence_parallel: bool
    chunk_size: int
    temperature: float
    vocab_size: int | None

    def check(self, hidden: Tensor, targets: Tensor) -> int:
        """Raise ValueError unless shapes, types, group and numbers fit. Local: no collective, no value is read.

        Returns:
            The number of tokens that can be targets.
        """
        weight = self.weight
        validation.check_tensors(hidden=hidden, weight=weight, targets=targets)
        validation.check_floating(hidden=hidden, weight=weight)
        validation.check_integers(targets=targets)
        if hidden.dim() < 2:
            raise ValueError(f"hidden must be [..., H], not {hidden.dim()}-d")
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(f"weight must be [V/tp, {hidden.shape[-1]}] (hidden's last), not {list(weight.shape)}")
        if weight.dtype != hidden.dtype:
            raise ValueError(f"weight is {weight.dtype}, hidden {hidden.dtype}: they must have one type")
        validation.check_count("chunk_size", self.chunk_size)
        validation.check_positive("temperature", self.temperature)
        validation.check_group("tp_group", self.tp_group)
        ranks = group_size(self.tp_group)
        if self.sequence_parallel and ranks == 1:
            raise ValueError("sequence_parallel=True needs a tp_group of more than one rank")
        whole = [hidden.shape[0] * (ranks if self.sequence_parallel else 1), *hidden.shape[1:-1]]
        reason = f"hidden's, with sequence_parallel its first dimension times {ranks} ranks of tp_group"
        validation.check_shapes(whole, reason, targets=targets)
        return validation.check_vocab_size(self.vocab_size, weight.shape[0], ranks, "weight")

    def sweep(self, hidden: Tensor, targets: Tensor, positions: Tensor) -> Sweep:
        """The sweep over the tokens at `positions` [n] of hidden states [..., H] and targets [...]. One all-gather
        under sequence parallelism."""
        states, shard = hidden.detach().reshape(-1, hidden.shape[-1]), self.weight.shape[0]
        rows = self.weight.detach()[: softmax.real_columns(self.vocab_size, shard, self.tp_group)]
        return Sweep(
            all_gather(states, self.tp_group) if self.sequence_parallel else states,
            rows,
            positions,
            softmax.local_targets(targets.reshape(-1)[positions], rows.shape[0], shard, self.tp_group),
            self,
        )


@dataclass(frozen=True)
class Sweep:
    """The logits of the n unmasked tokens over this rank's part of the vocabulary, chunk by chunk.

    Attributes:
        states: [T, H], the hidden states of all tokens.
        rows: [columns, H], the weight's rows that are tokens, without padding and without gradient.
        positions: [n], of the unmasked tokens; the same on all tensor-parallel ranks.
        targets: [n], columns of this rank's shard, -1 where another rank owns them.
    """

    states: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    layer: OutputLayer

    @property
    def dtype(self) -> torch.dtype:
        """The type of statistics and gradients: float32, or float64 for float64."""
        return softmax.statistics_dtype(self.rows.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """[n] -> [T], 0 where masked."""
        return values.new_zeros(self.states.shape[0]).index_copy_(0, self.positions, values)

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """(chunk, its logits [rows, columns]). Logits are valid until the next chunk, and may be overwritten.

        They have the weight's type; on CUDA they are the GEMM's float32 sums.
        """
        tokens, weight = self.positions.numel(), self.rows
        # Chunks of one size: a small last one would waste its GEMMs.
        rows = -(-tokens // -(-tokens // self.layer.chunk_size)) if tokens else 0
        keep_sums = FLOAT32_PRODUCTS and weight.is_cuda and weight.dtype != self.dtype
        buffer = weight.new_empty(rows, weight.shape[0], dtype=self.dtype if keep_sums else weight.dtype)
        out_dtype: dict[str, Any] = {"out_dtype": self.dtype} if keep_sums else {}
        for start in range(0, tokens, rows or 1):
            chunk = slice(start, min(start + rows, tokens))
            logits = buffer[: chunk.stop - start]
            torch.mm(self.states[self.positions[chunk]], weight.t(), **out_dtype, out=logits)
            yield chunk, logits

    def local_statistics(self, chunk: slice, logits: Tensor) -> Tensor:
        return softmax.statistics(logits, self.targets[chunk], self.layer.temperature)

    def merge(self, local: Tensor) -> Tensor:
        """[4, rows] of this rank's shard -> log-normalizer, entropy and log-prob [3, rows]. One collective."""
        return torch.stack(softmax.merge(softmax.gather(local, self.layer.tp_group)))

    def statistics(self) -> Tensor:
        """[3, n] of all tokens, in a sweep of their own with one collective for all chunks."""
        local = torch.empty(4, self.positions.numel(), dtype=self.dtype, device=self.rows.device)
        for chunk, logits in self.logits():
            local[:, chunk] = self.local_statistics(chunk, logits)
        return self.merge(local)

    def gradient(
        self, chunk: slice, logits: Tensor, stats: Tensor, by_logprob: Tensor, by_entropy: Tensor | None
    ) -> Tensor:
        """The loss's gradient in a chunk's logits, in the weight's type; over the logits if they have that type.

        Args:
            stats: [3, rows], from `merge`.
            by_logprob, by_entropy: [rows], the loss's gradients.
        """
        out = logits if logits.dtype == self.rows.dtype else torch.empty_like(logits, dtype=self.rows.dtype)
        log_normalizer, entropy, _ = stats
        targets, temperature = self.targets[chunk], self.layer.temperature
        return softmax.gradient(logits, targets, log_normalizer, entropy, by_logprob, by_entropy, out, temperature)
