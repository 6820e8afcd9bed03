"""Scores of sampled responses: parted among the ranks, judged, brought together, and made into rewards."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import torch.distributed as dist

from megatron_aspo.config import RunConfig
from megatron_aspo.config_rewards import CodeRewardConfig, MathRewardConfig
from megatron_aspo.errors import RunError
from megatron_aspo.gathering import Gathering
from megatron_aspo.import_path import check_signature, import_object
from megatron_aspo.rewards.verdict import Verdict
from megatron_aspo.types import Prompt, Sample

if TYPE_CHECKING:
    from megatron_aspo.rewards.code_judge import CodeVerdict


class Verifier(Protocol):
    """Judges responses, as many at a time as it can. `Scorer` submits all samples of its rank before it waits."""

    def submit(self, sample: Sample) -> Future[Verdict] | Future[CodeVerdict]:
        """The verdict, when it is known: of `sample.text`, by what `sample.prompt.entry` holds. The score goes from 0
        to 1 (1: right), is finite, and the same for the same response."""
        ...

    def close(self) -> None:
        """Nothing will be submitted any more; called once, on an error too."""
        ...


RewardFunction = Callable[[str, dict[str, Any]], float]
"""The score of a response's text, by its prompt's entry (of files, the row)."""

Reward = Verifier | RewardFunction | str
"""Who judges: an object, a function, or the name of one (`SourceConfig.reward`)."""


class Scorer:
    """Judges samples by their prompts' verifiers. Every rank judges a part of them, and all get all scores: what has a
    time limit is judged once, so that ranks cannot come to different scores. Where no verdict can be reached a warning
    says why, and the run goes on.

    Args:
        reward: judges all samples, in place of their prompts' verifiers.

    Raises:
        UserError: a verifier cannot work here.
    """

    def __init__(self, config: RunConfig, reward: Reward | None = None) -> None:
        self.config = config
        kinds = sorted({source.verifier for source in config.data.all_sources}) if reward is None else []
        self._verifiers = {kind: open_verifier(kind, config) for kind in kinds}
        self._only = None if reward is None else open_verifier(reward, config)
        self._gather = Gathering()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for verifier in self._verifiers.values() if self._only is None else [self._only]:
            verifier.close()

    def score(self, samples: Sequence[Sample]) -> None:
        """Fill in `score`, `reward` and `unjudged`. Collective: all ranks have the same samples."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = samples[rank::ranks]
        futures = [(self._only or self._verifiers[sample.prompt.verifier]).submit(sample) for sample in mine]
        own = [_score_and_fault(future.result(), sample) for future, sample in zip(futures, mine, strict=True)]
        for first, part in enumerate(self._gather(own)):
            for sample, (score, unjudged) in zip(samples[first::ranks], part, strict=True):
                sample.score = score
                sample.unjudged = unjudged
                sample.reward = score - overlong_penalty(len(sample.token_ids), self.config)
        reasons = [sample.unjudged for sample in samples if sample.unjudged]
        if reasons and rank == 0:
            print(
                f"warning: {len(reasons)} of {len(samples)} responses could not be judged and score 0: {reasons[0]}",
                file=sys.stderr,
                flush=True,
            )


def overlong_penalty(length: int, config: RunConfig) -> float:
    """Of a response of so many tokens: from 0 where the buffer begins to `overlong_penalty` at the limit."""
    buffer = config.reward.overlong_buffer
    over = length - (config.rollout.max_response_tokens - buffer)
    return min(over / buffer, 1.0) * config.reward.overlong_penalty if buffer and over > 0 else 0.0


def open_verifier(kind: Reward, config: RunConfig) -> Verifier:
    """The verifier of this name (`SourceConfig.reward`), of this function, or the one that is given."""
    if not isinstance(kind, str):
        if hasattr(kind, "submit"):
            return cast("Verifier", kind)
        check_signature(getattr(kind, "__qualname__", repr(kind)), cast("RewardFunction", kind), "response", "row")
        return _Function(cast("RewardFunction", kind))
    if kind == "reasoning_gym":
        from megatron_aspo.rewards import reasoning_gym

        return _Function(reasoning_gym.judge)
    if kind == "math":
        return _Math(config.reward.math)
    if kind == "code":
        return _Code(config.reward.code, config.seed)
    return _Function(import_object(kind, "response", "row"))


class _Math:
    def __init__(self, config: MathRewardConfig) -> None:
        from megatron_aspo.rewards.math import MathVerifier

        self._verifier = MathVerifier(config)

    def submit(self, sample: Sample) -> Future[Verdict]:
        return self._verifier.submit(sample.text, sample.prompt.entry["answer"])

    def close(self) -> None:
        self._verifier.close()


class _Code:
    def __init__(self, config: CodeRewardConfig, seed: int) -> None:
        from megatron_aspo.rewards.code import CodeProblem, CodeVerifier, check_backend

        check_backend(config)
        self._verifier = CodeVerifier(config)
        self._seed = seed
        self._read = CodeProblem.from_row
        self._prompt: Prompt | None = None

    def submit(self, sample: Sample) -> Future[CodeVerdict]:
        # All responses to a prompt take the same tests: within a group they must be comparable.
        seed = hash((self._seed, sample.prompt.id))
        if sample.prompt is not self._prompt:  # a group's samples come one after the other; tests may be megabytes
            self._prompt, self._problem = sample.prompt, self._read(sample.prompt.entry)
        return self._verifier.submit(self._problem, sample.text, seed)

    def close(self) -> None:
        self._verifier.close()


def _score_and_fault(verdict: Verdict | CodeVerdict, sample: Sample) -> tuple[float, str]:
    """The score, and why there was no verdict if there was none."""
    if not math.isfinite(verdict.score):
        raise RunError(f"the reward gave {verdict.score} for the response {sample.text[:60]!r}; it must be finite")
    return verdict.score, verdict.reason if verdict.error else ""


class _Function:
    """A verifier that is an ordinary function of a response's text and its prompt's entry, called at once."""

    def __init__(self, function: RewardFunction) -> None:
        self._function = function

    def submit(self, sample: Sample) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        try:
            score = float(self._function(sample.text, sample.prompt.entry))
        except Exception as error:  # whatever the user's function raises
            raise RunError(f"the reward of {sample.prompt.data_source or 'the prompt'} failed: {error!r}") from error
        future.set_result(Verdict(score, ""))
        return future

    def close(self) -> None:
        pass
