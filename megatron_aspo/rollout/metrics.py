"""Metrics of scored responses."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from megatron_aspo.batch import Sample
from megatron_aspo.rollout.statistics import pass_at_k, standard_error


def sample_metrics(samples: Sequence[Sample], prefix: str) -> dict[str, float]:
    """Means over scored samples.

    Over judged samples, and absent without any: reward with its standard error, and accuracy (share of score 1). Over
    all samples: length in tokens, repetition, the share cut at the length limit and the share without a verdict. The
    verifier's metrics, over the samples that have them, do not replace these.
    """
    count = len(samples)
    reward, error, accuracy, unjudged = (
        ("reward/mean", "reward/standard_error", "reward/accuracy", "reward/unjudged")
        if prefix == "rollout"
        else (f"{prefix}/reward", f"{prefix}/reward_standard_error", f"{prefix}/accuracy", f"{prefix}/unjudged")
    )
    judged = [sample for sample in samples if not sample.unjudged]
    further: dict[str, list[float]] = defaultdict(list)
    for sample in judged:
        for name, value in sample.metrics.items():
            further[f"{prefix}/{name}"].append(value)
    metrics = {name: statistics.fmean(values) for name, values in further.items()} | {
        unjudged: 1 - len(judged) / count,
        f"{prefix}/response_length": sum(s.written_length for s in samples) / count,
        f"{prefix}/truncated": sum(s.finish_reason == "length" for s in samples) / count,
        f"{prefix}/repetition": sum(s.repetition for s in samples) / count,
        f"{prefix}/repetition_words": sum(s.repetition_words for s in samples) / count,
        f"{prefix}/count": float(count),
    }
    if any(sample.turns > 1 for sample in samples):
        metrics[f"{prefix}/turns"] = sum(sample.turns for sample in samples) / count
    if judged:
        metrics[reward] = sum(s.reward for s in judged) / len(judged)
        metrics[accuracy] = sum(s.score >= 1 for s in judged) / len(judged)
    rewards: dict[int, list[float]] = defaultdict(list)
    for sample in judged:
        rewards[sample.group].append(sample.reward)
    if (known := standard_error([statistics.fmean(group) for group in rewards.values()])) is not None:
        metrics[error] = known
    return metrics


def solve_rates(groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Shares of groups whose judged responses are all right (score 1) and all wrong: too easy and too hard to learn
    from. Groups without a judged response do not count; if no other is left the result is empty."""
    right = [[sample.score >= 1 for sample in group if not sample.unjudged] for group in groups]
    right = [scores for scores in right if scores]
    if not right:
        return {}
    return {
        "rollout/solve_all": sum(map(all, right)) / len(right),
        "rollout/solve_none": sum(not any(scores) for scores in right) / len(right),
    }


def pass_rates(groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """`eval/pass_at_k` for k = 2, 4, 8, ... up to the size of the groups: the mean of pass@k over the groups with at
    least k judged responses; absent without any."""
    judged = [[sample.score >= 1 for sample in group if not sample.unjudged] for group in groups]
    metrics: dict[str, float] = {}
    k = 2
    while rates := [pass_at_k(len(right), sum(right), k) for right in judged if len(right) >= k]:
        metrics[f"eval/pass_at_{k}"] = statistics.fmean(rates)
        k *= 2
    return metrics
