"""Groups in progress: every prompt is taken once, none too old, and a stopped pool goes on as if it had not stopped."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.rewards import RewardConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.errors import UserError
from megatron_aspo.journal.clock import Clock
from megatron_aspo.rollout.batches import sample_batch
from megatron_aspo.rollout.engine import Enough, Request, Response
from megatron_aspo.rollout.partial import Pool, steps_behind

SLOTS = 12


class Prompts:
    config = DataConfig()

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def draw(self, count: int) -> list[Prompt]:
        self.position += count
        return [Prompt(i, "", (1,), {}) for i in range(self.position - count, self.position)]

    def state_dict(self) -> dict[str, Any]:
        return {}


class LongTail:
    """Writes a token a step for the first `SLOTS` requests. Lengths are from a distribution with a long tail."""

    writers = ([0],)
    replica = 0
    spread = 1
    turns = None
    tokenizer = AsciiTokenizer()

    def __init__(self) -> None:
        self.version = self.steps = self.written = 0

    def length(self, request: Request) -> int:
        draw = np.random.default_rng([request.prompt.id, request.replica]).pareto(1.0)
        return min(60, 1 + int(3 * draw))

    def advance(self, requests: Sequence[Request], temperature: float, enough: Enough) -> list[Response]:
        written, ended, responses = (
            [list(request.prefix.versions) for request in requests],
            set[int](),
            list[Response](),
        )
        while len(ended) < len(requests) and not enough(ended):
            running = [i for i in range(len(requests)) if i not in ended][:SLOTS]
            self.steps += 1
            self.written += len(running)
            for i in running:
                written[i].append(self.version)
                if len(written[i]) == self.length(requests[i]):
                    ended.add(i)
        for i, versions in enumerate(written):
            array = np.array(versions, np.int32)
            responses.append(Response(array, array.astype(np.float32), array, None, "stop" if i in ended else None))
        return responses


def config(oversample: float, max_age: int = 2, **more: Any) -> RolloutConfig:
    return RolloutConfig(prompts_per_step=4, responses_per_prompt=3, oversample=oversample, max_age=max_age, **more)


def take(pool: Pool, prompts: Any, counts: Sequence[int]) -> list[Sample]:
    """The samples of a batch with a round of each size."""
    samples: list[Sample] = []
    for count in counts:
        samples += pool.sample(prompts, count, len(samples) // 3)
    pool.batch += 1
    pool.engine.version += 1
    return samples


@pytest.mark.parametrize(("oversample", "max_age"), [(1.25, 1), (1.5, 2), (2.0, 1), (3.0, 4)])
def test_every_prompt_is_taken_once_and_no_token_is_too_old(oversample: float, max_age: int) -> None:
    settings = config(oversample, max_age)
    pool, prompts, seen, oldest = Pool(LongTail(), settings), Prompts(), [], 0
    for batch in range(60):
        counts = [4, 2, 1] if batch % 7 == 3 else [4]
        samples = take(pool, prompts, counts)
        assert [sample.group for sample in samples] == [i // 3 for i in range(3 * sum(counts))]
        for i, sample in enumerate(samples):
            assert sample.versions is None or sample.versions.tolist() == sorted(sample.versions.tolist())
            assert sample.response_length == LongTail().length(Request(0, sample.prompt, 0, i % 3))
            oldest = max(oldest, batch - sample.weight_version)
        seen += [sample.prompt.id for sample in samples[::3]]
        assert len(pool.groups) < oversample * 4
    assert sorted(seen + [group.prompt.id for group in pool.groups]) == list(range(prompts.position))
    assert 0 < oldest <= steps_behind(settings)


def test_a_batch_does_not_wait_for_the_longest_responses() -> None:
    def steps(oversample: float) -> int:
        pool, prompts = Pool(LongTail(), config(oversample, 4)), Prompts()
        for _ in range(60):
            take(pool, prompts, [4])
        return pool.engine.steps

    assert steps(2.0) < 0.7 * steps(1.001)


@pytest.mark.parametrize("stop", [1, 5])
def test_a_pool_goes_on_after_a_checkpoint(stop: int) -> None:
    def content(samples: list[Sample]) -> list[Any]:
        return [(s.prompt.id, s.token_ids.tolist(), s.group, s.weight_version) for s in samples]

    pool, prompts = Pool(LongTail(), config(1.5)), Prompts()
    for _ in range(stop):
        take(pool, prompts, [4])
    state, resumed = pickle.loads(pickle.dumps(pool.state_dict())), Pool(LongTail(), config(1.5))
    resumed.load_state_dict(state)
    resumed.engine.version, others = pool.engine.version, Prompts(prompts.position)
    for _ in range(5):
        assert content(take(resumed, others, [4])) == content(take(pool, prompts, [4]))
    longer = Pool(LongTail(), config(1.5, max_response_tokens=9))
    with pytest.raises(UserError) as refused:
        longer.load_state_dict(state)
    assert str(refused.value) == (
        "the checkpoint has 2 unfinished groups with rollout.max_response_tokens=16, here 9; continue with the former, "
        "or delete the checkpoint's groups.pt, which leaves their prompts out"
    )


def test_many_groups_of_a_checkpoint_go_on_in_small_batches() -> None:
    pool, prompts, settings = Pool(LongTail(), config(3.0, 4)), Prompts(), replace(config(1.5, 1), prompts_per_step=1)
    for _ in range(6):
        take(pool, prompts, [4])
    resumed, left, state = Pool(LongTail(), settings), len(pool.groups), pool.state_dict()
    resumed.load_state_dict(state)
    resumed.engine.version, ages = pool.engine.version, list[int]()
    for batch in range(6, 6 + left):
        ages += [batch - sample.weight_version for sample in take(resumed, prompts, [1])]
    assert steps_behind(settings) < max(ages) <= steps_behind(settings, state)


@pytest.mark.parametrize(("oversample", "max_age"), [(1.5, 2), (3.0, 4)])
def test_a_token_counts_in_the_batch_that_writes_it(oversample: float, max_age: int) -> None:
    """Not in the batch that takes its response, which may have been written over several."""
    settings = config(oversample, max_age, dynamic_sampling=False)
    pool, taken, written = Pool(LongTail(), settings), list[float](), list[float]()
    prompts: Any = Prompts()
    scorer: Any = SimpleNamespace(config=RewardConfig(), score=lambda samples: None)
    for _ in range(50):
        clock, before = Clock(), pool.engine.written
        batch = sample_batch(pool.engine, prompts, scorer, settings, clock, pool)
        pool.engine.version += 1
        written.append(pool.engine.written - before)
        taken.append(sum(sample.written_length for group in batch.groups for sample in group))
        assert batch.metrics["rollout/tokens_per_second"] * clock["rollout"] == pytest.approx(written[-1])
    assert sum(written) > sum(taken)
    assert sum(abs(a - b) > 0.2 * a for a, b in zip(written, taken, strict=True)) > 10


def test_every_replica_needs_a_group() -> None:
    engine: Any = LongTail()
    engine.writers = [[i] for i in range(5)]
    with pytest.raises(UserError, match=r"5 replicas of the sampler, more than rollout.prompts_per_step=4"):
        Pool(engine, config(1.5))
