"""A user-defined engine and its samples are checked against the interface."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.rollout.build import CheckedEngine, build_engine, fingerprint

CONFIG = RolloutConfig(engine="test_custom_engine:Engine", max_response_tokens=4)
POLICY: Any = SimpleNamespace(vocab_size=100)
PROMPTS = [Prompt(i, "", (1, 2), {}) for i in range(3)]


def good(i: int, **changes: Any) -> Sample:
    """The i-th of two samples per prompt."""
    token_ids = np.array([3, 99], np.int32)
    sample = Sample(PROMPTS[i // 2], 5 + i // 2, token_ids, "stop", 7, np.zeros(2, np.float32))
    return replace(sample, **changes)


class Engine:
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.samples: Any = None

    def generate(self, *call: Any) -> Any:
        self.call = call
        return self.samples

    def refit(self) -> None:
        self.samples = "refitted"

    def sleep(self) -> None:
        self.samples = "asleep"


class Half:
    def __init__(self, *_: Any) -> None:
        self.generate = self.refit = len


def build(**options: Any) -> CheckedEngine:
    engine = build_engine(POLICY, CONFIG, "tokenizer", 3, **options)  # type: ignore[arg-type]
    assert isinstance(engine, CheckedEngine)
    return engine


@pytest.mark.parametrize(
    ("samples", "fault"),
    [
        ([good(0), good(1, group=6)], "sample 1 whose group is not 5"),
        ([good(0), good(1, prompt=PROMPTS[1])], "sample 1 whose prompt is not 0"),
        ([good(0), good(1, token_ids=())], r"sample 1 whose token_ids .*rollout\.max_response_tokens=4"),
        ([good(0), good(1, token_ids=(1,) * 5)], r"sample 1 whose token_ids .*rollout\.max_response_tokens=4"),
        ([good(0, token_ids=(3, 100)), good(1)], r"sample 0 whose token_ids .*\[0, 100\)"),
        ([good(0, token_ids=(-1, 3)), good(1)], r"sample 0 whose token_ids .*\[0, 100\)"),
        ([good(0), good(1, finish_reason="eos")], "sample 1 whose finish_reason"),
        ([good(0), good(1, rollout_logprobs=None)], r"sample 1 whose rollout_logprobs .*\[2\]"),
        ([good(0), good(1, rollout_logprobs=np.zeros(3))], r"sample 1 whose rollout_logprobs .*\[2\]"),
        ([good(0), "text"], "sample 1 whose type is not Sample"),
        ([good(0)], "not a list of 2 samples for 1 prompts"),
        (None, "not a list of 2 samples for 1 prompts"),
    ],
)
def test_faulty_samples_are_refused(samples: Any, fault: str) -> None:
    checked = build()
    engine: Any = checked.engine
    assert engine.arguments == (POLICY, CONFIG, "tokenizer", 3)
    engine.samples = samples
    with pytest.raises(RunError, match=rf"rollout\.engine=test_custom_engine:Engine .*{fault}"):
        checked.generate(PROMPTS[:1], 2, 1.0, first_group=5)
    assert engine.call == (PROMPTS[:1], 2, 1.0, 5)


def test_fingerprints_of_ranks_are_equal() -> None:
    """Each process draws a seed for hashes of strings and bytes."""
    code = "import test_custom_engine as t; print(t.fingerprint([t.good(0), t.good(1)]))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = partial(subprocess.check_output, [sys.executable, "-W", "ignore", "-c", code], text=True)
    seeds = [run(env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed}) for seed in "12"]
    assert int(seeds[0]) == int(seeds[1]) == fingerprint([good(0), good(1)])


def test_other_calls_reach_the_engine() -> None:
    checked = build()
    engine: Any = checked.engine
    engine.samples = [good(i) for i in range(6)]
    assert checked.generate(PROMPTS, 2, 1.0, first_group=5) == engine.samples
    checked.refit()
    assert engine.samples == "refitted"
    checked.sleep()
    assert engine.samples == "asleep"


def test_an_engine_without_a_method_is_refused() -> None:
    with pytest.raises(UserError, match=r"Half .* sleep"):
        build(engine=Half)
