"""The fused head on real ranks: process groups, each rank's shard of a batch, and the resulting gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from oracle import TEMPERATURE, VOCAB, Batch
from torch import Tensor

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.loss import LossOutput, fused_linear_policy_loss
from megatron_aspo.policy.packing import stream_part

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOKENS, WIDTH, SHARD, CHUNK = 256, 4, 200, 64


class Place:
    """Process groups of this rank in a world of tp x cp ranks, or of a single rank (1 x 1). Ranks of a
    tensor-parallel group are not adjacent. Without `zigzag` each context-parallel rank holds one contiguous piece of
    the stream, and thus different responses."""

    def __init__(self, tp: int, cp: int, zigzag: bool = True) -> None:
        self.tp, self.cp, self.zigzag = tp, cp, zigzag
        self.tp_group: Any = None
        self.cp_group: Any = None
        self.tp_rank = self.cp_rank = 0
        if tp * cp > 1:
            self.tp_rank, self.cp_rank = divmod(dist.get_rank(), cp)
            tp_groups = [dist.new_group([c + cp * t for t in range(tp)]) for c in range(cp)]
            cp_groups = [dist.new_group([c + cp * t for c in range(cp)]) for t in range(tp)]
            self.tp_group = tp_groups[self.cp_rank] if tp > 1 else None
            self.cp_group = cp_groups[self.tp_rank] if cp > 1 else None

    def part(self, values: Tensor, batch: Batch) -> Tensor:
        """Select this rank's tokens of [T, ...] or [B, T, ...]."""
        where = torch.arange(batch.tokens.shape[-1]).chunk(self.cp)[self.cp_rank]
        if self.zigzag:
            where = stream_part(batch.part_of, self.cp_rank, self.cp)
        return values.index_select(batch.tokens.dim() - 1, where)

    def shard(self, whole: Tensor) -> Tensor:
        """Select this rank's shard of the first dimension."""
        return whole.chunk(self.tp)[self.tp_rank].clone()

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        local = tokens - self.tp_rank * len(weight)
        own = (local >= 0) & (local < len(weight))
        embedded = F.embedding(local.masked_fill(~own, 0), weight) * own[..., None]
        return embedded if self.tp_group is None else reduce_from_tensor_model_parallel_region(embedded, self.tp_group)


def spoilt_data(place: Place, batch: Batch) -> dict[str, Any]:
    """This rank's shard of the batch, with NaN and invalid ids in masked slots."""
    data = {name: place.part(values, batch) for name, values in batch.data.items()}
    masked = ~data["loss_mask"]
    for name, values in data.items():
        if values.is_floating_point():
            data[name] = values.masked_fill(masked, torch.nan)
    data["targets"] = data["targets"].masked_fill(masked, -100)
    return data


def head_loss(
    place: Place, batch: Batch, config: PolicyLossConfig, base: Tensor, weight: Tensor, **options: Any
) -> LossOutput:
    """Run the fused head on this rank's shard of the batch; results are NaN where masked. Under sequence parallelism
    the rows are sequence first, as in Megatron."""
    data = {"old_logprobs": None, **spoilt_data(place, batch)}
    masked = ~data["loss_mask"]
    if options.get("sequence_parallel"):
        if batch.tokens.dim() == 2:
            data = {name: None if values is None else values.transpose(0, 1) for name, values in data.items()}
    elif batch.tokens.dim() == 2:
        del data["sequence_ids"]  # each row is a response
    hidden = base
    if batch.tied:
        hidden = base + 0.5 * place.embed(place.part(batch.tokens, batch), weight)
    if not options.get("sequence_parallel"):
        hidden = hidden.masked_fill(masked[..., None], torch.nan)
    options = {"chunk_size": 64, "temperature": TEMPERATURE, "vocab_size": VOCAB} | options
    groups = {"tp_group": place.tp_group, "cp_group": place.cp_group}
    return fused_linear_policy_loss(hidden, weight, **data, config=config, **groups, **options)


class Head:
    """Output and gradients of `head_loss` with a fresh weight. With `main_grad` the weight has Megatron's
    attributes, and `grad_weight` is the sum that Megatron's hook would compute."""

    def __init__(
        self, place: Place, batch: Batch, config: PolicyLossConfig, main_grad: bool = False, **options: Any
    ) -> None:
        weight: Any = place.shard(batch.weight).requires_grad_()
        if main_grad:
            fine = torch.float64 if weight.dtype == torch.float64 else torch.float32
            weight.main_grad = torch.zeros(weight.shape, dtype=fine)
            weight.grad_added_to_main_grad = False
            weight.zero_out_wgrad = batch.tied
        base = place.part(batch.base, batch)
        if options.get("sequence_parallel"):
            base = place.shard(base.transpose(0, 1) if batch.tokens.dim() == 2 else base)
        base.requires_grad_()
        self.output = head_loss(place, batch, config, base, weight, **options)
        self.output.loss_sum.backward()
        assert base.grad is not None
        self.grad_hidden = base.grad
        if not main_grad:
            assert weight.grad.dtype == weight.dtype
            self.grad_weight = weight.grad.double()
            return
        assert weight.grad_added_to_main_grad
        assert (weight.grad is None) != batch.tied  # the placeholder gradient has been freed
        self.grad_weight = weight.main_grad.double()
        if batch.tied:
            self.grad_weight = self.grad_weight + weight.grad


def random_inputs(tp: int, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(SHARD, WIDTH, generator=generator).to(dtype).requires_grad_()
    old = torch.full((TOKENS,), -5.0)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.arange(TOKENS) % (SHARD * tp),
        "old_logprobs": old,
        "advantages": torch.ones(TOKENS),
        "loss_mask": torch.ones(TOKENS, dtype=torch.bool),
        "rollout_logprobs": old + 0.1,
        "sequence_ids": torch.arange(TOKENS) // 50,
        "chunk_size": CHUNK,
        **changes,
    }
