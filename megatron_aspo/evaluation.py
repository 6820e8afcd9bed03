"""Held-out evaluation."""

from __future__ import annotations

from megatron_aspo.data import ReasoningGymPrompts
from megatron_aspo.metrics import sample_metrics
from megatron_aspo.rewards.reasoning_gym import score
from megatron_aspo.rollout.megatron import EmbeddedEngine


def evaluate(engine: EmbeddedEngine, prompts: ReasoningGymPrompts) -> dict[str, float]:
    """One greedy response to every held-out prompt, scored by the task's verifier."""
    samples = engine.generate(prompts.held_out, responses_per_prompt=1, temperature=0.0)
    score(samples)
    return sample_metrics(samples, "eval")
