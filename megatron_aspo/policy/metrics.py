"""Metrics of updates and of the mismatch with the sampler: summed on each rank, then reduced over all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_aspo.batch import MicroBatch
from megatron_aspo.config.rollout import RolloutConfig

OPTIMIZER_METRICS = ("grad_norm", "grad_norm_max", "skipped")
"""Names that `UpdateMetrics.reduce` adds to the loss's."""


@dataclass
class UpdateMetrics:
    """Sums and counts of one or more updates, local until `reduce`.

    Attributes:
        sums: name -> [2] float64, (sum, count).
        maxima: name -> largest value. `log_ratio_max_first` is max |log r| in the first update, 0 if the trainer
            reproduces its own old log-probs.
        grad_norms: one per update, before clipping.
        skipped: updates that were skipped because their gradient was not finite; they count nowhere else.
    """

    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    maxima: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    grad_norms: list[float] = field(default_factory=list[float])
    skipped: int = 0

    def add(self, reported: Sequence[dict[str, Any]], grad_norm: float) -> None:
        """Add one update: what `megatron_loss_tuple` returned for its micro-batches."""
        for micro_batch in reported:
            for name, pair in micro_batch["metrics"].items():
                self.sums[name] = self.sums.get(name, 0) + torch.stack([value.double() for value in pair])
            maxima = dict(micro_batch["maxima"])
            if not self.grad_norms:
                maxima["log_ratio_max_first"] = maxima["log_ratio_max"]
            for name, value in maxima.items():
                self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value
        self.grad_norms.append(grad_norm)

    def reduce(self) -> dict[str, float]:
        """Means over all tokens of all ranks, the same on every rank. Collective.

        The last pipeline stage reduces over data- and context-parallel ranks and broadcasts to the other stages.
        """
        means: dict[str, float] = {}
        if self.sums:  # on the last stage
            group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
            names, max_names = sorted(self.sums), sorted(self.maxima)
            table = torch.stack([self.sums[name] for name in names])
            maxima = torch.stack([self.maxima[name].double() for name in max_names])
            dist.all_reduce(table, group=group)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
            sums = zip(names, table.tolist(), strict=True)
            means = {name: float(total / count) for name, (total, count) in sums if count}
            means |= dict(zip(max_names, maxima.tolist(), strict=True))
        carrier = [means]
        last: Any = parallel_state.get_pipeline_model_parallel_last_rank()
        stages: Any = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast_object_list(carrier, src=last, group=stages)
        means = carrier[0]
        if self.grad_norms:
            means["grad_norm"] = sum(self.grad_norms) / len(self.grad_norms)
            means["grad_norm_max"] = max(self.grad_norms)
        if self.grad_norms or self.skipped:
            means["skipped"] = float(self.skipped)
        return means


def measure_rollouts(
    mini_batches: Sequence[Sequence[MicroBatch]], rollout: RolloutConfig, version: int
) -> dict[str, float]:
    """`mismatch/*` of batches with `old_logprobs`, and the age of tokens where it can differ in a batch. Collective.

    Args:
        mini_batches: none on all pipeline stages but the last.
        version: of the policy's weights.
    """
    has_older = rollout.max_staleness > 0 or rollout.oversample > 1
    mismatch = measure_mismatch(mini_batches, version if has_older else None)
    values = {f"mismatch/{name}": value for name, value in mismatch.items()}
    if rollout.oversample > 1 or rollout.in_flight:
        ages = measure_staleness(mini_batches, version)
        values |= {f"rollout/{name}": value for name, value in ages.items()}
    return values


def measure_staleness(mini_batches: Sequence[Sequence[MicroBatch]], version: int) -> dict[str, float]:
    """Age of all response tokens of all ranks, relative to weights of `version`. Collective.

    Args:
        mini_batches: none on all pipeline stages but the last.

    Returns:
        staleness_tokens: mean number of optimizer updates since the weights that wrote a token.
        older_tokens: share of tokens that older weights wrote.
    """
    metrics = UpdateMetrics()
    parts = [
        version - batch.weight_versions[batch.loss_positions].double()
        for batches in mini_batches
        for batch in batches
        if batch.weight_versions is not None
    ]
    if parts:  # on the last pipeline stage
        ages = torch.cat(parts)
        count = ages.new_tensor(float(len(ages)))
        metrics.sums["staleness_tokens"] = torch.stack([ages.sum(), count])
        metrics.sums["older_tokens"] = torch.stack([(ages > 0).double().sum(), count])
        metrics.maxima["staleness_tokens_max"] = ages.max() if len(ages) else ages.new_zeros(())
    return metrics.reduce()


def measure_mismatch(mini_batches: Sequence[Sequence[MicroBatch]], version: int | None = None) -> dict[str, float]:
    """Statistics of d = log π_old - log π_rollout, in nats, over all response tokens of all ranks. Collective.

    Args:
        mini_batches: with `old_logprobs`.
        version: of the weights of `old_logprobs`; it adds the first and the fourth statistic of the tokens that these
            weights wrote as `name_current` (numerics alone, with updates in flight also an older KV cache), of the
            others as `name_older` (staleness too).

    Returns:
        logprob_diff: mean of `|d|`.
        logprob_diff_max: largest `|d|`.
        logprob_bias: mean of d; about -kl if the distributions are the same.
        kl: mean of exp(d) - 1 - d, the non-negative estimate k3 of KL(π_rollout || π_old).
        outside: share of tokens whose ratio exp(d) lies outside [0.5, 2].
    """
    metrics = UpdateMetrics()
    parts, ages = list[Tensor](), list[Tensor]()
    for batch in itertools.chain.from_iterable(mini_batches):
        if batch.old_logprobs is not None and batch.rollout_logprobs is not None:  # on the last pipeline stage
            parts.append((batch.old_logprobs - batch.rollout_logprobs)[batch.loss_positions].double())
            if version is not None and batch.weight_versions is not None:
                ages.append(version - batch.weight_versions[batch.loss_positions])
    if parts:
        d = torch.cat(parts)
        ratio, every = d.exp(), torch.ones_like(d, dtype=torch.bool)
        columns = {
            "logprob_diff": d.abs(),
            "kl": torch.expm1(d) - d,
            "logprob_bias": d,
            "outside": ((ratio < 0.5) | (ratio > 2.0)).double(),
        }
        chosen = {name: (values, every) for name, values in columns.items()}
        if ages:
            older = torch.cat(ages) > 0
            for name in ("logprob_diff", "kl"):
                chosen |= {f"{name}_current": (columns[name], ~older), f"{name}_older": (columns[name], older)}
        for name, (values, tokens) in chosen.items():
            metrics.sums[name] = torch.stack([values[tokens].sum(), tokens.sum()])
        metrics.maxima["logprob_diff_max"] = d.abs().max() if len(d) else d.new_zeros(())
    return metrics.reduce()
