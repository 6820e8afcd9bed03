"""What is said of a batch of responses."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_aspo.types import Sample

REPETITION_NGRAM = 4


def sample_metrics(samples: Sequence[Sample], prefix: str) -> dict[str, float]:
    """Means over samples: `reward` and `accuracy` (share of reward 1), length in tokens, share cut at the
    length limit, and repetition: the share of a response's 4-grams that occurred in it before."""
    count = len(samples)
    reward, accuracy = (
        ("reward/mean", "reward/accuracy") if prefix == "rollout" else (f"{prefix}/reward", f"{prefix}/accuracy")
    )
    return {
        reward: sum(s.reward for s in samples) / count,
        accuracy: sum(s.reward >= 1 for s in samples) / count,
        f"{prefix}/response_length": sum(len(s.token_ids) for s in samples) / count,
        f"{prefix}/truncated": sum(s.finish_reason == "length" for s in samples) / count,
        f"{prefix}/repetition": sum(repetition(s.token_ids) for s in samples) / count,
        f"{prefix}/count": float(count),
    }


def repetition(token_ids: Sequence[int]) -> float:
    """The share of 4-grams that occurred before in the same response; 0 where it has fewer than 5 tokens."""
    grams = [tuple(token_ids[i : i + REPETITION_NGRAM]) for i in range(len(token_ids) - REPETITION_NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
