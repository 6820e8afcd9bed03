"""A run that learns within a minute: the demo's model spells words of four letters backwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_aspo.run_log import read_metrics

DEMO = Path(__file__).parents[2] / "examples" / "demo_chain_sum.yaml"
TASK = {
    "task": "spell_backward",
    "task_args": {"min_word_len": 4, "max_word_len": 4},
    "prompt_template": "{word}=",
    "eval_prompts": 128,
}
SETTINGS = [
    "model.max_sequence_length=16",
    "parallel.tensor=1",
    "warmup.updates=200",
    "warmup.batch_prompts=64",
    "warmup.wrong_fraction=0.3",
    "train.steps=10",
    "checkpoint.every=0",
    "eval.every=0",
]


def train_to_spell(folder: Path, name: str, *settings: str) -> list[dict[str, Any]]:
    """What a run on two data-parallel ranks logged. Runs in one folder share the warm-up."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(DEMO.read_text()), "data": TASK}))
    where = [f"name={name}", f"output_dir={folder}", f"warmup.cache_dir={folder}/cache"]
    command = [sys.executable, "-m", "megatron_aspo.cli", "train", str(config), "--nproc", "2"]
    done = subprocess.run(
        [*command, *SETTINGS, *where, *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return read_metrics(folder / name)
