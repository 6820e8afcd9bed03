"""Scores of sampled responses: judged by the ranks that own them, gathered, and made into rewards."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol, Self, cast

import torch
import torch.distributed as dist

from megatron_aspo.batch import EVERY_RANK, Prompt, Sample
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.import_path import check_signature, import_object
from megatron_aspo.config.rewards import CodeRewardConfig, MathRewardConfig, RewardConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.errors import RunError
from megatron_aspo.ranks.gathering import gather_objects, sum_tables
from megatron_aspo.rewards.functions import FunctionVerifier, RewardFunction
from megatron_aspo.rewards.repetition import token_repetition, word_repetition
from megatron_aspo.rewards.verdict import Verdict


class Verifier(Protocol):
    """Judges responses concurrently. `Scorer` submits all samples of its rank before it awaits the first verdict."""

    def submit(self, sample: Sample) -> Future[Verdict]:
        """The verdict on `sample.text` as an answer to `sample.prompt.entry`. Its score is finite, from 0 to 1 (1:
        right), and always the same for the same response."""
        ...

    def close(self) -> None:
        """Release resources. Called once, after the last `submit` or an error."""
        ...


SCORES = 5
"""Numbers of a sample in the ranks' tables: score, two measures of repetition, whether it has no verdict, and how many
further metrics it has."""

Reward = Verifier | RewardFunction | str
"""A verifier, a reward function, or the name of one or of a verifier's class (`SourceConfig.reward`)."""


class Scorer:
    """Judges samples by their prompts' verifiers. Each rank judges its own, and all ranks get all scores.

    Args:
        reward: judges all samples, in place of their prompts' verifiers.

    Raises:
        UserError: a verifier cannot work here.
    """

    def __init__(
        self, data: DataConfig, config: RewardConfig, rollout: RolloutConfig, reward: Reward | None = None
    ) -> None:
        self.config, self._max_tokens = config, rollout.max_response_tokens
        self._seconds = rollout.environment_seconds
        names = sorted({source.verifier for source in data.all_sources}) if reward is None else []
        self._verifiers = {name: open_verifier(name, config, data.seed) for name in names}
        self._only = None if reward is None else open_verifier(reward, config, data.seed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for verifier in self._verifiers.values() if self._only is None else [self._only]:
            verifier.close()

    def score(self, samples: Sequence[Sample]) -> None:
        """Fill in `score`, `reward`, `unjudged`, `metrics` and the two measures of repetition. Prints a warning if some
        could not be judged. Collective: all ranks pass the same samples, and the owner of each judges it."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        judges = [i % ranks if s.owner == EVERY_RANK else s.owner for i, s in enumerate(samples)]
        rows = [i for i, judge in enumerate(judges) if judge == rank]
        local = [samples[i] for i in rows]
        futures = [self._submit(sample) for sample in local]
        repetitions = [(token_repetition(sample.written), word_repetition(sample.text)) for sample in local]
        verdicts = [_checked(future.result(), sample) for future, sample in zip(futures, local, strict=True)]
        table = torch.zeros(len(samples), SCORES, dtype=torch.float64)
        for i, verdict, repetition in zip(rows, verdicts, repetitions, strict=True):
            numbers = [verdict.score, *repetition, verdict.error, len(verdict.metrics)]
            table[i] = torch.tensor(numbers, dtype=torch.float64)
        table = sum_tables(table)
        more: dict[int, tuple[str, Mapping[str, float]]] = {}  # reasons of faults, and metrics
        if table[:, 3:].any():
            own = {
                i: ((verdict.reason or "no reason was given") if verdict.error else "", verdict.metrics)
                for i, verdict in zip(rows, verdicts, strict=True)
                if verdict.error or verdict.metrics
            }
            more = {i: rest for share in gather_objects(own) for i, rest in share.items()}
        for i, (sample, row) in enumerate(zip(samples, table.tolist(), strict=True)):
            sample.score, sample.repetition, sample.repetition_words, *_ = row
            sample.unjudged, sample.metrics = more.get(i, ("", {}))
            penalty = overlong_penalty(sample.written_length, self.config, self._max_tokens)
            sample.reward = sample.score - penalty
        if rank == 0 and (unjudged := _unjudged(samples)):
            print(f"warning: {unjudged}", file=sys.stderr, flush=True)

    def _submit(self, sample: Sample) -> Future[Verdict]:
        """The verdict, by the verifier unless there is an environment's score."""
        if (score := sample.environment_score) is None:
            return (self._only or self._verifiers[sample.prompt.verifier]).submit(sample)
        verdict: Future[Verdict] = Future()
        slow = f"the environment took more than rollout.environment_seconds={self._seconds:g}"
        fault = {math.inf: slow, -math.inf: "the environment raised an OSError"}.get(score, "")
        verdict.set_result(Verdict(0.0, fault, error=True) if fault else Verdict(score, ""))
        return verdict


def check_judged(samples: Sequence[Sample], config: RewardConfig) -> None:
    """Raise RunError if more than `config.max_unjudged` of the scored samples have no verdict."""
    if sum(bool(sample.unjudged) for sample in samples) > config.max_unjudged * len(samples):
        raise RunError(
            f"{_unjudged(samples)}; reward.max_unjudged={config.max_unjudged:g} is the largest share allowed"
        )


def _unjudged(samples: Sequence[Sample]) -> str:
    """A line with the number of samples without a verdict and their most frequent reason; empty if there are none."""
    reasons = Counter(sample.unjudged for sample in samples if sample.unjudged)
    if not reasons:
        return ""
    return f"{reasons.total()} of {len(samples)} responses could not be judged: {reasons.most_common(1)[0][0]}"


def overlong_penalty(length: int, config: RewardConfig, max_tokens: int) -> float:
    """Penalty on `length` tokens of the policy: 0 up to the buffer's start, `config.overlong_penalty` at the limit."""
    buffer = config.overlong_buffer
    over = length - (max_tokens - buffer)
    return min(over / buffer, 1.0) * config.overlong_penalty if buffer and over > 0 else 0.0


def open_verifier(reward: Reward, config: RewardConfig, seed: int) -> Verifier:
    """The verifier for a reward. `seed` draws the tests of code."""
    if not isinstance(reward, str):
        if hasattr(reward, "submit"):
            return cast("Verifier", reward)
        function, name = cast("RewardFunction", reward), getattr(reward, "__qualname__", repr(reward))
        check_signature(name, function, "response", "row")
        return FunctionVerifier(function, name, config.function)
    if reward == "reasoning_gym":
        from megatron_aspo.rewards import reasoning_gym

        reasoning_gym.import_reasoning_gym()  # takes seconds, which every worker would need of its own
        return FunctionVerifier(reasoning_gym.judge, reward, config.function)
    if reward == "math":
        return _Math(config.math)
    if reward == "code":
        return _Code(config.code, seed)
    imported = import_object(reward)
    if hasattr(imported, "submit"):
        check_signature(reward, imported)
        return cast("Verifier", imported())
    check_signature(reward, imported, "response", "row")
    return FunctionVerifier(imported, reward, config.function)


class _Math:
    def __init__(self, config: MathRewardConfig) -> None:
        from megatron_aspo.rewards.mathematics.verifier import MathVerifier

        self._verifier = MathVerifier(config)
        self.close = self._verifier.close

    def submit(self, sample: Sample) -> Future[Verdict]:
        return self._verifier.submit(sample.text, sample.prompt.entry["answer"])


class _Code:
    def __init__(self, config: CodeRewardConfig, seed: int) -> None:
        from megatron_aspo.rewards.programs.verifier import CodeProblem, CodeVerifier

        self._verifier = CodeVerifier(config)
        self.close = self._verifier.close
        self._seed, self._read = seed, CodeProblem.from_row
        self._prompt: Prompt | None = None

    def submit(self, sample: Sample) -> Future[Verdict]:
        # All responses of a group take the same tests, so that their scores can be compared.
        seed = hash((self._seed, sample.prompt.id))
        if sample.prompt is not self._prompt:  # parsed once a group; tests may be megabytes
            self._prompt, self._problem = sample.prompt, self._read(sample.prompt.entry)
        return self._verifier.submit(self._problem, sample.text, seed)


def _checked(verdict: Verdict, sample: Sample) -> Verdict:
    """The verdict; RunError if a number of it is not finite."""
    for name, value in (("reward", verdict.score), *verdict.metrics.items()):
        if not math.isfinite(value):
            raise RunError(f"the {name} of the response {sample.text[:60]!r} is {value}; it must be finite")
    return verdict
