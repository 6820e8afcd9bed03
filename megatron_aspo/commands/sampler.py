"""A policy and its rollout engine without training, for the commands besides `train`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.tokenizer import Tokenizer
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.build import build_engine
from megatron_aspo.rollout.engine import RolloutEngine


@contextlib.contextmanager
def open_sampler(
    config: RunConfig, tokenizer: Tokenizer, weights: Path | None
) -> Iterator[tuple[Policy, RolloutEngine]]:
    """Join the ranks' process group; yield a policy and an engine with the same weights. Collective.

    weights: a checkpoint; None for the run's initial weights.
    """
    with distributed(config):
        policy = Policy(config, tokenizer.vocab_size)
        if weights is not None:
            checkpoint.load_weights(weights, policy)
        engine = build_engine(policy, config.rollout, tokenizer, config.seed)
        engine.refit()
        yield policy, engine
