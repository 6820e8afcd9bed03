"""Supervised warm-up of a model that starts from random weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data import PromptStream
from megatron_aspo.data.files import file_mark, find_files
from megatron_aspo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_aspo.errors import UserError
from megatron_aspo.journal.journal import Journal
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.trainer import Policy

SUPERVISED = PolicyLossConfig(objective="no_is")
"""With advantage 1 and ratio 1 the policy gradient is the gradient of the negative log-likelihood."""

_LOG_EVERY = 10
_SEED = 500_000_009
"""Added to the seed of the training problems. reasoning-gym draws problem i of seed s with s + i, so streams of similar
seeds overlap."""


def warm_up(policy: Policy, config: RunConfig, journal: Journal) -> None:
    """Train random weights on demonstrations, so that the model follows the format and is sometimes right.

    Demonstrations come from a separate stream, without the held-out problems. The resulting weights are cached.
    """
    cached = cache_path(config)
    if (cached / "meta.json").is_file():
        checkpoint.load_weights(cached, policy)
        journal.say(f"warm-up: loaded from {cached}")
        return
    warmup, limit = config.warmup, config.rollout.max_response_tokens
    decay_updates = warmup.updates if warmup.lr_decay else None
    policy.reset_optimizer(replace(config.optimizer, lr=warmup.lr, weight_decay=0.0), decay_updates)
    source = _data(config)
    seed = (source.seed + _SEED) % (1 << 30)
    data = replace(source, seed=seed if seed != source.eval_seed else seed + 1)
    tokenizer = load_tokenizer(config.model, config.data)
    prompts = PromptStream(data, tokenizer, config.max_prompt_tokens)
    rng = np.random.default_rng([config.init_seed, _SEED])
    metrics = UpdateMetrics()
    for update in range(1, warmup.updates + 1):
        drawn = prompts.draw(warmup.batch_prompts)
        demonstrations = make_demonstrations(drawn, tokenizer, warmup.wrong_fraction, rng)
        if (longest := max(sample.response_length for sample in demonstrations)) > limit:
            raise UserError(
                f"an answer of {config.data.name} has {longest} tokens with its end mark, rollout.max_response_tokens "
                f"is {limit}; raise it"
            )
        policy.train_step(policy.pack(demonstrations), SUPERVISED, metrics)
        if update % _LOG_EVERY == 0 or update == warmup.updates:
            means = metrics.reduce()
            values = {"loss/nll": means["nll"]} if "nll" in means else {}  # all updates may have been skipped
            journal.record("warmup", update, warmup.updates, values)
            metrics = UpdateMetrics()
    checkpoint.save_weights(cached, policy)
    policy.reset_optimizer(config.optimizer)


def make_demonstrations(
    prompts: list[Prompt], tokenizer: Tokenizer, wrong_fraction: float, rng: np.random.Generator
) -> list[Sample]:
    """One demonstration per prompt; a share `wrong_fraction` of them has a wrong answer.

    A wrong answer is the right one with one digit replaced, or the next prompt's if the right one has no digit.
    """
    wrong = rng.random(len(prompts)) < wrong_fraction
    samples: list[Sample] = []
    for index, prompt in enumerate(prompts):
        answer = _answer(prompt)
        if wrong[index]:
            digits = [i for i, c in enumerate(answer) if c.isdigit()]
            if digits:
                i = int(rng.choice(digits))
                answer = f"{answer[:i]}{(int(answer[i]) + int(rng.integers(1, 10))) % 10}{answer[i + 1 :]}"
            else:
                answer = _answer(prompts[(index + 1) % len(prompts)])
        token_ids = (*tokenizer.encode(answer), *tokenizer.eos_ids[:1])
        samples.append(
            Sample(prompt, group=index, token_ids=np.array(token_ids, np.int32), finish_reason="stop", advantage=1.0)
        )
    return samples


def _answer(prompt: Prompt) -> str:
    """The first accepted answer."""
    answer = prompt.entry.get("answer")
    if answer is None:
        raise UserError(
            f"warmup: the problem {prompt.text[:40]!r} has no answer to demonstrate; give its file a column answer, or "
            "set warmup.updates=0"
        )
    return str(answer[0] if isinstance(answer, list) else answer)


def _data(config: RunConfig) -> DataConfig:
    """The prompts' settings, with the seed of `warmup.seed`."""
    return config.data if config.warmup.seed is None else replace(config.data, seed=config.warmup.seed)


def cache_path(config: RunConfig) -> Path:
    """Folder of the warmed-up weights, named by everything that they depend on except the layout."""
    # The warm-up has its own learning rate and no weight decay. It learns the tempered distribution.
    optimizer = replace(config.optimizer, lr=config.warmup.lr, weight_decay=0.0)
    sections = [asdict(section) for section in (config.model, config.fp8, _data(config), config.warmup, optimizer)]
    paths = [source.path for source in config.data.all_sources if source.path]
    files = [file_mark(file) for path in paths for file in find_files(path)]
    key = json.dumps([config.init_seed, config.rollout.temperature, sections, files], sort_keys=True)
    return Path(config.warmup.cache_dir) / f"warmup-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
