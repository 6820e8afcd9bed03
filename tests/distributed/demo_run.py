"""Runs of the demo's model on other problems."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_aspo.journal.log import read_metrics

DEMO = Path(__file__).parents[2] / "examples" / "demo_chain_sum.yaml"


def train_demo(folder: Path, name: str, data: dict[str, Any], *settings: str) -> list[dict[str, Any]]:
    """Logged metrics of a run on two data-parallel ranks. Runs in one folder share the warm-up."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(DEMO.read_text()), "data": data}))
    where = [
        f"name={name}",
        f"output_dir={folder}",
        f"warmup.cache_dir={folder}/cache",
        f"data.cache_dir={folder}/cache",
    ]
    fixed = ["parallel.tensor=1", "checkpoint.every=0", "eval.every=0", "warmup.batch_prompts=64"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_aspo.cli", "train", str(config), "--nproc", "2", *where, *fixed, *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return read_metrics(folder / name)
