"""The whole loop, as a user starts it, teaches a model a task that it could hardly do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_aspo.run_log import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Words of four letters, backwards: the demo's model learns that within a minute, warm-up included.
CONFIG = """
name: learning
model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 192, max_sequence_length: 32, init_std: 0.1}
parallel: {tensor: 2}
data:
  task: spell_backward
  task_args: {min_word_len: 4, max_word_len: 4}
  prompt_template: "{word}="
warmup: {updates: 250, wrong_fraction: 0.4}
rollout: {max_response_tokens: 8}
loss: {objective: aspo, kl_coef: 0.001}
optimizer: {lr: 3.0e-4, adam_beta2: 0.98}
train: {steps: 10}
checkpoint: {every: 0}
eval: {every: 0}
"""


def test_aspo_raises_accuracy_by_15_points(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    folders = [f"output_dir={tmp_path}", f"warmup.cache_dir={tmp_path}/cache"]
    run = subprocess.run(
        [sys.executable, "-m", "megatron_aspo.cli", "train", f"{tmp_path}/run.yaml", *folders],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    before, after = (r for r in read_metrics(tmp_path / "learning") if r["phase"] == "eval")
    assert (before["step"], after["step"]) == (0, 10)
    assert 0.05 < before["eval/accuracy"] < 0.5
    assert after["eval/accuracy"] > before["eval/accuracy"] + 0.15
