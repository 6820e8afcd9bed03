"""The command line: a run that is stopped, killed and resumed logs exactly the metrics of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ranks import without_times

from megatron_aspo.journal.log import read_metrics
from megatron_aspo.ranks.stop_signals import INTERRUPTED_FILE

pytestmark = pytest.mark.distributed

STEPS = 10
CONFIG = f"""
model: {{hidden_size: 32, ffn_hidden_size: 64, max_sequence_length: 16}}
parallel: {{tensor: 2}}
data:
  task: chain_sum
  task_args: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}
  prompt_template: "{{expression}} ="
  eval_prompts: 32
warmup: {{updates: 40, batch_prompts: 32, wrong_fraction: 0.3}}
rollout: {{prompts_per_step: 8, responses_per_prompt: 8, max_response_tokens: 4}}
loss: {{kl_coef: 0.1}}
optimizer: {{lr: 3.0e-3}}
train: {{steps: {STEPS}, mini_batch_prompts: 4, epochs: 2}}
checkpoint: {{every: 2, keep: 2, asynchronous: true}}
eval: {{every: 2}}
"""


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start runs, each in a new session with its warm-up cached beside it; all are killed when the test ends."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    runs: list[subprocess.Popen[str]] = []

    def start_one(name: str, *arguments: str) -> subprocess.Popen[str]:
        overrides = [f"name={name}", f"output_dir={tmp_path}", f"warmup.cache_dir={tmp_path}/{name}-cache"]
        run = subprocess.Popen(
            [sys.executable, "-m", "megatron_aspo.cli", "train", f"{tmp_path}/run.yaml", *overrides, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=(tmp_path / f"{name}.out").open("a"),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        runs.append(run)
        return run

    yield start_one
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def steps_done(run_dir: Path) -> int:
    if not (run_dir / "metrics.jsonl").is_file():
        return 0
    return max((r["step"] for r in read_metrics(run_dir) if r["phase"] == "train"), default=0)


def wait_for_step(run: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while steps_done(run_dir) < step:
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(session: int) -> list[int]:
    found: list[int] = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


@pytest.mark.long
def test_a_stopped_and_killed_run_resumes_to_the_bit(tmp_path: Path, start: Start) -> None:
    undisturbed = start("undisturbed")
    _, stderr = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, stderr
    expected = without_times(tmp_path / "undisturbed")
    train = [record for record in expected if record["phase"] == "train"]
    assert [record["step"] for record in train] == list(range(1, STEPS + 1))
    assert all(record["optimizer/grad_norm"] > 0.01 for record in train)  # every step had a nonzero gradient
    assert train[-1]["loss/kl"] > 1e-4  # the reference policy affects the loss

    stopped = start("killed")
    wait_for_step(stopped, tmp_path / "killed", 1)
    rank_1 = next(p for p in psutil.Process(stopped.pid).children() if p.environ()["RANK"] == "1")
    rank_1.send_signal(signal.SIGUSR1)  # signals a single rank, which forwards the stop to the others
    _, stderr = stopped.communicate(timeout=120)
    assert stopped.returncode == 0, stderr
    step = int((tmp_path / "killed" / INTERRUPTED_FILE).read_text())
    assert step == steps_done(tmp_path / "killed") < STEPS - 2
    assert (tmp_path / "killed" / "checkpoints" / f"step_{step:06d}").is_dir()

    killed = start("killed", "--resume", "auto")
    wait_for_step(killed, tmp_path / "killed", step + 1)
    killed.send_signal(signal.SIGKILL)  # signals the launcher alone: its ranks must not outlive it
    killed.wait()
    time.sleep(1)
    assert alive(killed.pid) == []
    assert steps_done(tmp_path / "killed") < STEPS

    assert "changed" not in (tmp_path / "killed.out").read_text()
    resumed = start("killed", "--resume", "auto", "checkpoint.keep=3")
    _, stderr = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, stderr
    assert "checkpoint.keep=3 (was 2)" in (tmp_path / "killed.out").read_text()
    assert without_times(tmp_path / "killed") == expected

    refused = start("killed", "parallel.tensor=1")
    _, stderr = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "--resume auto" in stderr
