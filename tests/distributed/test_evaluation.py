"""`megatron-aspo eval --benchmark`: a killed evaluation, restarted on another number of ranks, writes the same bytes
as an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

PROBLEMS, SAMPLES = 200, 16
CONFIG = f"""
name: t
model: {{hidden_size: 32, ffn_hidden_size: 64, max_sequence_length: 16, init_std: 0.2}}
data:
  task: chain_sum
  task_args: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}
  prompt_template: "{{expression}} ="
  eval_prompts: {PROBLEMS}
rollout: {{max_response_tokens: 2, batch_size: 8}}
"""


def start(folder: Path, out: str, ranks: int, *overrides: str) -> subprocess.Popen[str]:
    words = ["--checkpoint", "base", "--benchmark", "reasoning_gym:chain_sum", "--samples", str(SAMPLES), *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_aspo.cli", "eval", "run.yaml", *words, "--out", out, "--nproc", str(ranks)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(run: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    return out, err


def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    folder = "reasoning_gym-chain_sum-base"
    killed = start(tmp_path, "killed", 1)
    whole = start(tmp_path, "whole", 1)
    kept = tmp_path / "killed" / folder / "responses.jsonl"
    try:
        while not kept.exists() or kept.read_bytes().count(b"\n") < 5 * SAMPLES:
            assert killed.poll() is None, killed.communicate()[1]
            time.sleep(0.005)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
    out, _ = finish(whole)
    with open(kept, "ab") as file:
        file.write(b'{"problem": "torn')
    done = kept.read_bytes().count(b"\n") // SAMPLES
    assert 5 <= done < PROBLEMS

    _, err = finish(start(tmp_path, "killed", 2))
    assert f"{done} of {PROBLEMS} problems are done already" in err
    expected = (tmp_path / "whole" / folder / "responses.jsonl").read_bytes()
    assert kept.read_bytes() == expected

    responses = [json.loads(line) for line in expected.splitlines()]
    assert [(r["problem"], r["sample"]) for r in responses] == [
        (str(problem), sample) for problem in range(1, PROBLEMS + 1) for sample in range(SAMPLES)
    ]
    assert len({r["text"] for r in responses}) > 100
    right = [r["score"] >= 1 for r in responses]
    assert any(right)  # some guesses are
    results = json.loads((tmp_path / "killed" / folder / "results.json").read_text())
    assert results[f"avg@{SAMPLES}"]["value"] == pytest.approx(sum(right) / len(right))
    solved = [any(right[i : i + SAMPLES]) for i in range(0, len(right), SAMPLES)]
    assert results[f"pass@{SAMPLES}"]["value"] == pytest.approx(sum(solved) / PROBLEMS)
    assert results["truncated"] == pytest.approx(sum(r["finish_reason"] == "length" for r in responses) / len(right))
    assert f"avg@{SAMPLES} {100 * sum(right) / len(right):.1f} [" in out
    page = (tmp_path / "killed" / folder / "page.html").read_text()
    assert page.count("<summary>response ") == len(responses)


def test_a_benchmark_with_a_custom_engine(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "my_engine.py").write_text("from megatron_aspo.rollout.megatron import EmbeddedEngine as Engine\n")
    finish(start(tmp_path, "custom", 1, "rollout.engine=my_engine:Engine", "data.eval_prompts=4"))
    results = json.loads((tmp_path / "custom" / "reasoning_gym-chain_sum-base" / "results.json").read_text())
    assert results["problems"] == 4
    assert results["settings"]["engine"] == "my_engine:Engine"
