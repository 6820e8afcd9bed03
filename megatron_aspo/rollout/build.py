"""Builds the rollout engine. A user's own engine is checked against the interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.rollout import ENGINES, RolloutConfig
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.rollout.choice import EngineClass, import_engine

if TYPE_CHECKING:
    from megatron_aspo.data.tokenizer import Tokenizer
    from megatron_aspo.policy.trainer import Policy
    from megatron_aspo.ranks.channel import Channel
    from megatron_aspo.rollout.engine import RolloutEngine


def build_engine(
    policy: Policy,
    config: RolloutConfig,
    tokenizer: Tokenizer,
    seed: int,
    channel: Channel | None = None,
    engine: EngineClass | None = None,
) -> RolloutEngine:
    """Build the configured engine. One with weights of its own needs a `refit` before it samples.

    Args:
        channel: leads to the rollout ranks, which then sample.
        engine: takes the place of the configured engine.
    """
    if engine is not None or config.engine not in ENGINES:
        make = engine or import_engine(config.engine)
        name = config.engine if engine is None else getattr(engine, "__qualname__", repr(engine))
        return CheckedEngine(make(policy, config, tokenizer, seed), name, policy.vocab_size, config.max_response_tokens)
    if channel is not None:
        from megatron_aspo.rollout.remote import RemoteEngine

        return RemoteEngine(policy, config, channel, tokenizer)
    from megatron_aspo.rollout.turns import play_turns

    if config.engine == "vllm":
        from megatron_aspo.rollout.vllm import VllmEngine
        from megatron_aspo.rollout.weight_sync import PolicyWeights

        routes = policy.config.train.router_replay == "sampler"
        vllm = VllmEngine(PolicyWeights(policy), policy.config.model, config, tokenizer, seed, routes=routes)
        return play_turns(vllm, policy.config)
    from megatron_aspo.rollout.megatron import EmbeddedEngine

    return play_turns(EmbeddedEngine(policy, config, tokenizer, seed), policy.config)


class CheckedEngine:
    """A user's engine whose samples are checked against the interface.

    Args:
        name: of the engine, for messages.
    """

    def __init__(self, engine: RolloutEngine, name: str, vocab_size: int, max_response_tokens: int) -> None:
        self.engine = engine
        self.name = name
        self.vocab_size = vocab_size
        self.max_response_tokens = max_response_tokens
        for method in ("generate", "refit", "sleep"):
            if not callable(getattr(engine, method, None)):
                raise UserError(f"{name} has no method {method}; RolloutEngine requires it")
        self.refit, self.sleep = engine.refit, engine.sleep

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, temperature: float, first_group: int = 0
    ) -> list[Sample]:
        """See `RolloutEngine.generate`.

        Raises:
            RunError: the engine's samples break the interface.
        """
        from megatron_aspo.ranks.gathering import gather_objects  # imports torch

        samples: Any = self.engine.generate(prompts, responses_per_prompt, temperature, first_group)
        expected = [(prompt, first_group + i) for i, prompt in enumerate(prompts) for _ in range(responses_per_prompt)]
        if not isinstance(samples, list) or len(samples) != len(expected):
            raise self._failure(f"not a list of {len(expected)} samples for {len(prompts)} prompts")
        for i, (sample, (prompt, group)) in enumerate(zip(samples, expected, strict=True)):
            for field, is_sound, rule in self._rules(sample, prompt, group):
                if not is_sound:
                    raise self._failure(f"a sample {i} whose {field} is not {rule}")
        if len(set(gather_objects(fingerprint(samples)))) > 1:
            raise self._failure("different samples on different ranks; all must return the same list")
        return samples

    def _rules(self, sample: Any, prompt: Prompt, group: int) -> Iterator[tuple[str, bool, str]]:
        """Yield a field, whether it is sound, and the rule for it."""
        yield "type", isinstance(sample, Sample), "Sample"
        yield "prompt", sample.prompt.id == prompt.id, f"{prompt.id}, in the order of the prompts"
        yield "group", sample.group == group, f"{group}, in the order of the prompts"
        ids, logprobs = sample.token_ids, sample.rollout_logprobs
        limit = f"1 to rollout.max_response_tokens={self.max_response_tokens} tokens"
        yield "token_ids", 1 <= len(ids) <= self.max_response_tokens, limit
        yield "token_ids", min(ids) >= 0 and max(ids) < self.vocab_size, f"in the vocabulary [0, {self.vocab_size})"
        yield "finish_reason", sample.finish_reason in ("stop", "length"), "stop or length"
        yield "rollout_logprobs", logprobs is not None and logprobs.shape == (len(ids),), f"of shape [{len(ids)}]"

    def _failure(self, fault: str) -> RunError:
        return RunError(f"rollout.engine={self.name} returned {fault}")


def fingerprint(samples: Sequence[Sample]) -> int:
    """Hash of the responses, the same in every process."""
    return hash(tuple((sample.group, *sample.token_ids.tolist()) for sample in samples))  # of integers alone
