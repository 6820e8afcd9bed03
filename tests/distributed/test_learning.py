"""The demo's recipe on a task that it learns in seconds: accuracy on held-out problems rises, as much with vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from demo_run import train_demo

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SPELL_BACKWARDS = {
    "task": "spell_backward",
    "task_args": {"min_word_len": 4, "max_word_len": 4},
    "prompt_template": "{word}=",
    "eval_prompts": 320,
}
SETTINGS = ("model.max_sequence_length=16", "warmup.updates=200", "warmup.wrong_fraction=0.3", "train.steps=10")
GAIN = 0.15
"""Minimum rise of the accuracy. Measured: from 0.22 to 0.77, and with vLLM to 0.80."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learning")


@pytest.fixture(scope="module")
def embedded(folder: Path) -> list[dict[str, Any]]:
    return learn(folder, "megatron")


def learn(folder: Path, engine: str) -> list[dict[str, Any]]:
    # Heads of 32, which vLLM has a kernel for.
    engines = (f"rollout.engine={engine}", "rollout.kv_cache_gb=0.1", "model.num_attention_heads=2")
    return train_demo(folder, engine, SPELL_BACKWARDS, *SETTINGS, *engines)


def accuracies(records: list[dict[str, Any]]) -> tuple[float, float]:
    """Held-out accuracy (avg@4) before and after."""
    before, after = (record["eval/accuracy"] for record in records if record["phase"] == "eval")
    return before, after


def test_a_short_run_learns(embedded: list[dict[str, Any]]) -> None:
    before, after = accuracies(embedded)
    assert after > before + GAIN
    for record in (record for record in embedded if record["phase"] == "train"):
        assert record["loss/log_ratio_max_first"] <= 1e-5
        assert record["loss/ratio_pos"] > record["loss/ratio_neg"]  # the policy moves towards the right answers


@pytest.mark.engines
def test_sampling_with_vllm_learns_as_much(folder: Path, embedded: list[dict[str, Any]]) -> None:
    before, after = accuracies(learn(folder, "vllm"))
    assert after > before + GAIN
    # An accuracy of 320 prompts has a standard error of at most 0.028, the difference of two 0.04. The test allows
    # three.
    assert abs(after - accuracies(embedded)[1]) < 0.12
