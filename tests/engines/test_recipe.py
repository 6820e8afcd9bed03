"""Whole runs on files with the demo's model on two ranks: math-verify judges mathematics, the sandbox judges
programs and runs those that a response calls as its tool."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demo_run import train_demo

from megatron_aspo.journal.log import read_samples

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


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_a_run_on_mathematics_with_a_python_tool(tmp_path: Path) -> None:
    """Turns end behind their block, the sandbox's output follows, and math-verify judges what the policy wrote."""
    rows = [
        {"prompt": f"{a}*{b}=", "answer": f"```python\nprint({a}*{b})\n```\n\\boxed{{{a * b}}}"}
        for a in range(2, 10)
        for b in range(2, 10)
    ]
    (tmp_path / "products.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = train_demo(
        tmp_path,
        "run",
        {"path": str(tmp_path / "products.jsonl"), "reward": "math", "eval_prompts": 16},
        "train.steps=2",
        "warmup.updates=120",
        "model.max_sequence_length=112",
        'rollout={environment: python, stop: ["```\\n"], max_turns: 3, max_response_tokens: 96}',
        "rollout.dynamic_sampling=false",
        "rollout.prompts_per_step=8",
        "rollout.responses_per_prompt=4",
        "train.mini_batch_prompts=4",
        "train.log_samples=8",
        "train.log_samples_every=1",
    )
    run_blocks, scores = 0, list[float]()
    for sample in (response for group in read_samples(tmp_path / "run") for response in group["responses"]):
        pieces = iter(sample["tokens"])
        parts = [(version, "".join(next(pieces) for _ in range(count))) for version, count in sample["versions"]]
        for (_, turn), (version, observation) in zip(parts[::2], parts[1::2], strict=False):
            assert version == -1
            if product := re.search(r"```python\nprint\((\d)\*(\d)\)\n```\n$", turn):
                assert observation == f"\n```output\n{int(product[1]) * int(product[2])}\n```\n"
                run_blocks += 1
        scores.append(sample["score"])
    assert run_blocks > 32  # 63 of 64 responses here
    assert 0 < sum(scores) < len(scores)
    assert all(record["rollout/turns"] > 1 for record in records if record["phase"] == "train")
