"""What is said of a batch of responses."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from megatron_aspo.types import Sample

REPETITION_NGRAM = 4


def sample_metrics(samples: Sequence[Sample], prefix: str) -> dict[str, float]:
    """Means over samples: `reward` and `accuracy` (share of reward 1), length in tokens, share cut at the
    length limit, and repetition: the share of a response's 4-grams that occurred in it before. With the
    reward comes its standard error."""
    count = len(samples)
    reward, error, accuracy = (
        ("reward/mean", "reward/standard_error", "reward/accuracy")
        if prefix == "rollout"
        else (f"{prefix}/reward", f"{prefix}/reward_standard_error", f"{prefix}/accuracy")
    )
    metrics = {
        reward: sum(s.reward for s in samples) / count,
        accuracy: sum(s.reward >= 1 for s in samples) / count,
        f"{prefix}/response_length": sum(len(s.token_ids) for s in samples) / count,
        f"{prefix}/truncated": sum(s.finish_reason == "length" for s in samples) / count,
        f"{prefix}/repetition": sum(repetition(s.token_ids) for s in samples) / count,
        f"{prefix}/count": float(count),
    }
    if (known := standard_error(samples)) is not None:
        metrics[error] = known
    return metrics


def standard_error(samples: Sequence[Sample]) -> float | None:
    """Of the mean reward, with equally many samples of every prompt. Samples of a prompt are not independent, so it
    comes from the spread of the prompts' own means; of a single prompt it is not known."""
    rewards: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        rewards[sample.group].append(sample.reward)
    means = [statistics.fmean(of_prompt) for of_prompt in rewards.values()]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def repetition(token_ids: Sequence[int]) -> float:
    """The share of 4-grams that occurred before in the same response; 0 where it has fewer than 5 tokens."""
    grams = [tuple(token_ids[i : i + REPETITION_NGRAM]) for i in range(len(token_ids) - REPETITION_NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
