"""Rollout engines of the user's own: the contract of `RolloutEngine`, checked at every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_aspo.errors import RunError, UserError
from megatron_aspo.gathering import Gathering
from megatron_aspo.rollout.engine import RolloutEngine
from megatron_aspo.types import Prompt, Sample

if TYPE_CHECKING:
    from megatron_aspo.policy.trainer import Policy


class CheckedEngine:
    """Another engine, whose samples are looked at before anything is made of them.

    Args:
        name: of the engine, in messages.
    """

    def __init__(self, engine: RolloutEngine, name: str, policy: Policy) -> None:
        self.engine = engine
        self.name = name
        self.policy = policy
        self._gather = Gathering()
        for method in ("generate", "refit", "sleep"):
            if not callable(getattr(engine, method, None)):
                raise UserError(f"{name} has no method {method}; give it those of RolloutEngine")

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, temperature: float, first_group: int = 0
    ) -> list[Sample]:
        """See `RolloutEngine.generate`.

        Raises:
            RunError: the engine did not return what was asked for.
        """
        samples: Any = self.engine.generate(prompts, responses_per_prompt, temperature, first_group)
        asked = [(prompt, first_group + i) for i, prompt in enumerate(prompts) for _ in range(responses_per_prompt)]
        if not isinstance(samples, list) or len(samples) != len(asked):
            found = f"{len(samples)} samples" if isinstance(samples, list) else f"{type(samples).__name__}"
            raise self._failure(
                f"returned {found} for {len(prompts)} prompts; return a list of {responses_per_prompt} for each"
            )
        for i, (sample, (prompt, group)) in enumerate(zip(samples, asked, strict=True)):
            if fault := self._fault(sample, prompt, group):
                raise self._failure(f"returned a sample {i} {fault}")
        self._check_ranks_agree(samples)
        return samples

    def refit(self) -> None:
        self.engine.refit()

    def sleep(self) -> None:
        self.engine.sleep()

    def _fault(self, sample: Any, prompt: Prompt, group: int) -> str:
        """What is wrong with the sample; empty if nothing is."""
        if not isinstance(sample, Sample):
            return f"that is no Sample but {type(sample).__name__}"
        if (sample.prompt.id, sample.group) != (prompt.id, group):
            return (
                f"of prompt {sample.prompt.id} and group {sample.group}, where prompt {prompt.id} and group {group} "
                "are due; keep the order of the prompts"
            )
        if not sample.token_ids:
            return "without a token; a response has at least its end mark"
        if not (min(sample.token_ids) >= 0 and max(sample.token_ids) < self.policy.vocab_size):
            return f"with a token id outside the vocabulary [0, {self.policy.vocab_size})"
        limit = self.policy.config.rollout.max_response_tokens
        if len(sample.token_ids) > limit:
            return f"of {len(sample.token_ids)} tokens, more than rollout.max_response_tokens={limit}"
        if sample.finish_reason not in ("stop", "length"):
            return f"with finish_reason={sample.finish_reason!r}, which is neither stop nor length"
        logprobs = sample.rollout_logprobs
        if logprobs is None or logprobs.shape != (len(sample.token_ids),):
            shape = "none" if logprobs is None else f"shape {list(logprobs.shape)}"
            return f"whose rollout_logprobs are {shape}, expected one for each of {len(sample.token_ids)} tokens"
        if sample.weight_version != self.policy.updates:
            return (
                f"of weight_version {sample.weight_version}, where the policy has taken {self.policy.updates} updates; "
                "refit takes over its weights"
            )
        return ""

    def _check_ranks_agree(self, samples: list[Sample]) -> None:
        digests = self._gather(hash(tuple((sample.group, sample.token_ids) for sample in samples)))
        if len(set(digests)) > 1:
            raise self._failure("returned other samples on other ranks; return the same list on all")

    def _failure(self, what: str) -> RunError:
        return RunError(f"rollout.engine={self.name} {what}")
