"""Advantages of a batch, and the gradient that they give, are the same on one rank and on several.

Those of reinforce++ are of the whole batch: a rank that took the mean of its own share would show here.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ranks import gradients_of_steps, open_policy, run, tiny_run
from torch import Tensor

from megatron_aspo.batch import Sample
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.rewards import RewardConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.data import PromptStream
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.journal.clock import Clock
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.rewards.scoring import Scorer
from megatron_aspo.rewards.verdict import Verdict
from megatron_aspo.rollout.advantages import ADVANTAGES
from megatron_aspo.rollout.batches import sample_batch
from megatron_aspo.rollout.build import build_engine
from megatron_aspo.train import set_logprobs

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "dp2": (2, ParallelConfig()),
    "dp2-pp2": (4, ParallelConfig(pipeline=2)),
    "cp2": (2, ParallelConfig(context=2)),
}
Batch = tuple[list[tuple[float, float]], list[int], dict[str, Tensor]]
"""(reward, advantage) of each sample with a verdict, the samples that this rank trains on, full gradients."""


class Letters:
    """The share of small letters, a number that binary fractions do not hold. Every fourth text has no verdict."""

    def submit(self, sample: Sample) -> Future[Verdict]:
        verdict: Future[Verdict] = Future()
        letters = sum(map(str.islower, sample.text)) / 3 / max(1, len(sample.text))
        verdict.set_result(Verdict(letters, "", error=sum(map(ord, sample.text)) % 4 == 0))
        return verdict

    def close(self) -> None: ...


def batches(weights: Path, parallel: ParallelConfig) -> dict[str, Batch]:
    """A batch of 15 responses and its update by each advantage, from the same weights."""
    rollout = RolloutConfig(prompts_per_step=5, responses_per_prompt=3, max_response_tokens=12, dynamic_sampling=False)
    config = tiny_run(
        weights, parallel=parallel, rollout=rollout, reward=RewardConfig(overlong_buffer=3, overlong_penalty=0.1)
    )
    found: dict[str, Batch] = {}
    tokenizer = AsciiTokenizer()
    with (
        open_policy(config, weights / "current") as policy,
        Scorer(config.data, config.reward, rollout, Letters()) as scorer,
    ):
        gradients, engine = gradients_of_steps(policy), build_engine(policy, rollout, tokenizer, config.seed)
        for name in ADVANTAGES:
            prompts = PromptStream(config.data, tokenizer, config.max_prompt_tokens)
            batch = sample_batch(engine, prompts, scorer, replace(rollout, advantage=name), Clock())
            samples = [sample for group in batch.groups for sample in group]
            packed = policy.pack(samples)
            set_logprobs(policy, [packed])
            policy.train_step(packed, config.loss, UpdateMetrics())
            numbers = [(sample.reward, sample.advantage) for sample in samples]
            found[name] = numbers, [i for part in packed for i in part.samples], gradients.pop()
    return found


@pytest.fixture(scope="module")
def alone(weights: Path) -> dict[str, Batch]:
    return run(1, batches, weights, ParallelConfig())[0]


def test_statistics_are_of_the_whole_batch(alone: dict[str, Batch]) -> None:
    for name in ("reinforce++", "reinforce++_baseline"):
        rewards, advantages = np.array(alone[name][0]).T
        assert 8 <= len(rewards) < 15
        assert len(set(rewards)) > 4
        assert advantages.mean() == pytest.approx(0, abs=1e-12)
        assert advantages.std(ddof=1) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_advantages_and_gradients_are_the_same_at(layout: str, weights: Path, alone: dict[str, Batch]) -> None:
    world, parallel = LAYOUTS[layout]
    ranks = run(world, batches, weights, parallel)
    for name, (numbers, _, expected) in alone.items():
        for others, own, gradients in (rank[name] for rank in ranks):
            assert others == numbers
            if layout != "cp2" and name.startswith("reinforce++"):  # its share's mean is not the batch's
                assert abs(np.mean([numbers[i][1] for i in own])) > 1e-3
            for key, gradient in gradients.items():
                largest = expected[key].abs().max()
                assert float((gradient - expected[key]).abs().max() / largest) < 1e-5, (name, key)
        together = sorted(i for rank in ranks for i in rank[name][1])
        copies = 2 if layout != "dp2" else 1  # of a share
        assert together == sorted([*range(len(numbers))] * copies)
