"""The demo's recipe on a task that it learns in seconds: the policy gets better at problems it has never seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_aspo.run_log import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

DEMO = Path(__file__).parents[2] / "examples" / "demo_chain_sum.yaml"
TASK = {
    "task": "spell_backward",
    "task_args": {"min_word_len": 4, "max_word_len": 4},
    "prompt_template": "{word}=",
    "eval_prompts": 128,
}
OVERRIDES = [
    "name=learning",
    "model.max_sequence_length=16",
    "parallel.tensor=1",
    "warmup.updates=200",
    "warmup.batch_prompts=64",
    "warmup.wrong_fraction=0.3",
    "train.steps=10",
    "checkpoint.every=0",
    "eval.every=0",
]
GAIN = 0.15
"""Measured: from 0.14 to 0.56 at one rank and at tp=2, to 0.59 at dp=2."""


def test_a_short_run_learns(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**yaml.safe_load(DEMO.read_text()), "data": TASK}))
    folders = [f"output_dir={tmp_path}", f"warmup.cache_dir={tmp_path}/cache"]
    command = [sys.executable, "-m", "megatron_aspo.cli", "train", f"{tmp_path}/run.yaml", "--nproc", "2"]
    done = subprocess.run(
        [*command, *OVERRIDES, *folders],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    records = read_metrics(tmp_path / "learning")
    before, after = (record for record in records if record["phase"] == "eval")
    assert after["eval/accuracy"] > before["eval/accuracy"] + GAIN
    for record in (record for record in records if record["phase"] == "train"):
        assert record["loss/log_ratio_max_first"] <= 1e-5
        assert record["loss/ratio_pos"] > record["loss/ratio_neg"]  # it moves to what was right
