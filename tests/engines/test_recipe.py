"""Whole runs on files with the demo's model on two ranks: math-verify judges mathematics, the sandbox judges
programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demo_run import train_demo

pytestmark = pytest.mark.engines

STEPS = 4
SETTINGS = (f"train.steps={STEPS}", "warmup.updates=150")


def check(records: list[dict[str, Any]]) -> None:
    """Check that all steps ran, with right and wrong answers and with updates."""
    steps = [record for record in records if record["phase"] == "train"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        assert 0 < record["reward/accuracy"] < 1
        assert 0 < record["time/reward"] < record["time/step"]  # the wait for verdicts is a separate phase
        assert record["optimizer/grad_norm"] > 1e-3
        assert record["rollout/groups_kept"] > 0
    assert [record["step"] for record in records if record["phase"] == "eval"] == [0, STEPS]


def test_a_run_on_parquet_and_math_verify(tmp_path: Path) -> None:
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{a}+{b}="}],
            "reward_model": {"ground_truth": f"\\frac{{{2 * (a + b)}}}{{2}}", "style": "rule"},
        }
        for a in range(10)
        for b in range(10)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sums.parquet")
    # The right answer is an unusual fraction whose verdict requires algebra. The model learns it from demonstrations
    # that contain mistakes.
    records = train_demo(
        tmp_path,
        "run",
        {"path": str(tmp_path / "sums.parquet"), "reward": "math", "eval_prompts": 16},
        *SETTINGS,
        "reward.math.require_boxed=false",
        "rollout.max_response_tokens=16",
        "reward.overlong_buffer=4",
    )
    check(records)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_a_run_on_programs_that_are_tested(tmp_path: Path) -> None:
    rows = [
        {
            "task_id": f"Add/{a}{b}",
            "prompt": f"#x+{a}{b}\n",
            "entry_point": "f",
            "test": f"def check(f):\n    assert f(3) == {3 + 10 * a + b}\n    assert f(-1) == {10 * a + b - 1}\n",
            "answer": f"```python\nf=lambda x:x+{a}{b}\n```",
        }
        for a in range(1, 10)
        for b in range(10)
    ]
    (tmp_path / "add.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = train_demo(
        tmp_path,
        "run",
        {"path": str(tmp_path / "add.jsonl"), "reward": "code", "eval_prompts": 16},
        *SETTINGS,
        "model.max_sequence_length=64",
        "rollout.max_response_tokens=40",
        "rollout.prompts_per_step=8",
        "rollout.responses_per_prompt=4",
        "train.mini_batch_prompts=2",
        "rollout.max_rounds=1",
    )
    check(records)
