"""Partial rollouts in whole runs: killed and resumed to the bit, every prompt in one step."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import ends, run, tiny_run, without_times

from megatron_aspo import train as loop
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import CheckpointConfig, EvalConfig, OptimizerConfig, TrainConfig
from megatron_aspo.data import PromptStream
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.journal.log import read_metrics, read_samples
from megatron_aspo.policy.checkpoint import Saver
from megatron_aspo.policy.saved_batches import load_groups
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.partial import steps_behind
from megatron_aspo.train import train

pytestmark = pytest.mark.distributed

STEPS = 6


def config(folder: Path, name: str) -> RunConfig:
    rollout = RolloutConfig(
        prompts_per_step=4,
        responses_per_prompt=2,
        max_response_tokens=24,
        stop=tuple("abcdefghijkl"),  # responses of very unequal lengths
        dynamic_sampling=False,
        oversample=1.5,
        max_age=1,
        batch_size=8,
    )
    train = TrainConfig(
        steps=STEPS,
        mini_batch_prompts=2,
        epochs=1,
        max_tokens_per_micro_batch=1024,
        log_samples=99,
        log_samples_every=1,
    )
    return tiny_run(
        folder,
        name=name,
        rollout=rollout,
        train=train,
        loss=PolicyLossConfig(entropy_coef=0.1, rollout_correction="truncate"),
        optimizer=OptimizerConfig(lr=1e-3, lr_warmup_updates=0),
        checkpoint=CheckpointConfig(every=2, keep=0),
        eval=EvalConfig(every=0, at_start=False, at_end=False),
    )


def train_whole(config: RunConfig) -> None:
    with distributed(config):
        train(config, [])


def train_and_die(config: RunConfig) -> None:
    """Rank 1 kills itself in step 4 or soon after it."""
    file = Path(config.output_dir) / config.name / "metrics.jsonl"

    def die() -> None:
        while not file.is_file() or sum(record["phase"] == "train" for record in read_metrics(file.parent)) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "1":
        threading.Thread(target=die, daemon=True).start()
    train_whole(config)


def test_a_killed_run_goes_on_to_the_bit_and_takes_every_prompt_once(tmp_path: Path) -> None:
    run(2, train_whole, whole := config(tmp_path, "whole"))  # two replicas, each with its own groups
    codes = [code for code, _ in ends(2, train_and_die, config(tmp_path, "killed"))]
    assert codes[1] == -signal.SIGKILL
    killed = config(tmp_path, "killed")
    done = [record["step"] for record in read_metrics(tmp_path / "killed") if record["phase"] == "train"]
    assert 3 <= max(done) < STEPS
    run(2, train_whole, replace(killed, checkpoint=replace(killed.checkpoint, resume="auto")))

    records = without_times(tmp_path / "whole")
    assert without_times(tmp_path / "killed") == records
    lines = list(read_samples(tmp_path / "whole"))
    assert list(read_samples(tmp_path / "killed")) == lines
    steps = [record for record in records if record["phase"] == "train"]
    assert all(record["optimizer/grad_norm"] > 1e-3 for record in steps)
    ages = [record["rollout/staleness_tokens_max"] for record in steps]
    assert ages[0] == 0
    assert whole.updates_per_step <= max(ages) <= whole.updates_per_step * steps_behind(whole.rollout)
    assert max(record["rollout/older_tokens"] for record in steps) > 0.01
    assert [len(response["versions"]) for line in lines for response in line["responses"]].count(2) > 0

    trained = Counter(line["prompt"] for line in lines)
    groups: Any = load_groups(tmp_path / "whole" / "checkpoints" / f"step_{STEPS:06d}")
    trained.update(group.prompt.text for group in groups["groups"])
    stream = PromptStream(whole.data, AsciiTokenizer(), whole.max_prompt_tokens)
    assert trained == Counter(prompt.text for prompt in stream.draw(trained.total()))
    assert len(lines) == 4 * STEPS
    assert len(groups["groups"]) == 2


def count_groups(config: RunConfig) -> tuple[int, list[int]]:
    """Train; return how many groups were loaded from a checkpoint or saved to one, and after each step's sampling how
    many of them are in memory."""
    seen, alive = list[weakref.ref[Any]](), list[int]()
    load, save, split = loop.load_groups, Saver.save, loop.split_into_mini_batches

    def load_and_note(path: Path) -> Any:
        groups: Any = load(path)
        seen.extend(weakref.ref(group) for group in groups["groups"])
        return groups

    def save_and_note(self: Any, step: int, policy: Any, state: Any, batches: Any, groups: Any, *, wait: bool) -> None:
        seen.extend(weakref.ref(group) for group in groups["groups"])
        save(self, step, policy, state, batches, groups, wait=wait)

    def split_and_count(groups: Any, count: int) -> Any:
        alive.append(sum(reference() is not None for reference in seen))
        return split(groups, count)

    setattr(loop, "load_groups", load_and_note)  # noqa: B010
    setattr(Saver, "save", save_and_note)  # noqa: B010
    setattr(loop, "split_into_mini_batches", split_and_count)  # noqa: B010
    train_whole(config)
    return len(seen), alive


def test_the_groups_of_a_checkpoint_leave_memory(tmp_path: Path) -> None:
    part = config(tmp_path, "part")
    part = replace(part, train=replace(part.train, steps=4))
    assert run(1, count_groups, part) == [(4, [0, 0, 0, 0])]  # two groups after step 2, two after step 4
    rest = replace(part, train=replace(part.train, steps=6), checkpoint=replace(part.checkpoint, resume="auto"))
    assert run(1, count_groups, rest) == [(4, [0, 0])]
