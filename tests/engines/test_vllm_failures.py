"""vLLM dies or fails amid a run: it ends soon and with the cause, and goes on to the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import ends

from megatron_aspo.cli import HINTS
from megatron_aspo.run_log import read_metrics

pytestmark = [pytest.mark.engines, pytest.mark.distributed]

STEPS = 4
# Of two ranks that share vLLM's weights, the one left alone waits in shared memory, and not only in gloo.
CONFIG = f"""
name: {{name}}
output_dir: {{folder}}
model: {{{{hidden_size: 64, ffn_hidden_size: 96, num_attention_heads: 2, max_sequence_length: 14, init_std: 0.1}}}}
parallel: {{{{tensor: 2}}}}
data:
  task: chain_sum
  task_args: {{{{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2}}}}
  prompt_template: "{{{{expression}}}} ="
  eval_prompts: 8
  overlong_prompts: filter
warmup: {{{{updates: 40, batch_prompts: 32, wrong_fraction: 0.3, cache_dir: {{folder}}/cache}}}}
rollout:
  {{{{engine: vllm, tensor: 2, prompts_per_step: 4, responses_per_prompt: 8, max_response_tokens: 6,
  dynamic_sampling: false, batch_size: 32, kv_cache_gb: 0.05}}}}
optimizer: {{{{lr: 1.0e-3, lr_warmup_updates: 0}}}}
train: {{{{steps: {STEPS}, mini_batch_prompts: 2, epochs: 2}}}}
checkpoint: {{{{every: 2}}}}
eval: {{{{every: 2}}}}
"""


def start(folder: Path, name: str, *arguments: str, fault: tuple[str, ...] = ()) -> tuple[int, str, float]:
    """(exit code, stderr, seconds) of a run of two ranks; those with a fault are started by the launcher alone."""
    (folder / f"{name}.yaml").write_text(CONFIG.format(name=name, folder=folder))
    command = ["-m", "megatron_aspo.cli", "train", f"{folder}/{name}.yaml", *arguments]
    if fault:
        launched = ("failing_vllm", [*fault, f"{folder}/{name}.yaml", *arguments], 2, HINTS["train"])
        command = ["-c", f"import sys; from megatron_aspo.launch import run_local; sys.exit(run_local{launched!r})"]
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr, time.monotonic() - before


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    def timed(key: str) -> bool:
        return key == "time" or key.startswith("time/") or key.endswith("tokens_per_second")

    return [{k: v for k, v in record.items() if not timed(k)} for record in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], float]:
    """What a run logs that nothing happens to, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, stderr, seconds = start(folder, "undisturbed")
    assert code == 0, stderr
    return without_times(folder / "undisturbed"), seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "line"),
    [
        (
            "raise",
            "megatron-aspo: rank 1: vLLM failed while sampling: RuntimeError: DefaultCPUAllocator: can't allocate "
            "memory; what has been saved is intact, and training goes on with --resume auto",
        ),
        (
            "kill",
            "megatron-aspo: rank 1 was ended by SIGKILL; the others are stopped too; "
            "what has been saved is intact, and training goes on with --resume auto",
        ),
    ],
)
def test_a_failure_amid_the_responses(
    how: str, line: str, tmp_path: Path, undisturbed: tuple[list[dict[str, Any]], float]
) -> None:
    expected, seconds = undisturbed
    train = [record for record in expected if record["phase"] == "train"]
    assert [record["step"] for record in train] == [1, 2, 3, 4]
    assert all(record["optimizer/grad_norm"] > 1e-3 for record in train)
    filtered = [record["data/overlong_prompts"] for record in train]  # those with two digits
    assert 0 < filtered[0] < filtered[1] < filtered[2] < filtered[3] < 40

    code, stderr, until_end = start(tmp_path, how, fault=(how, "4"))
    assert code == 1
    assert [x for x in stderr.splitlines() if x.startswith("megatron-aspo:")] == [line]
    assert until_end < 2 * seconds + 60  # no rank waits the 30 minutes after which collectives give up
    checkpoints = sorted(path.name for path in (tmp_path / how / "checkpoints").iterdir())
    assert checkpoints == ["step_000002"]
    assert json.loads((tmp_path / how / "checkpoints" / "step_000002" / "meta.json").read_text())["step"] == 2
    logged = [record["step"] for record in without_times(tmp_path / how) if record["phase"] == "train"]
    assert logged == [1, 2, 3]

    if how == "raise":  # what is left on disk is the same
        return
    code, stderr, _ = start(tmp_path, how, "--resume", "auto")
    assert code == 0, stderr
    assert without_times(tmp_path / how) == expected


def with_another_vllm(site: Path, argv: list[str]) -> None:
    sys.path.insert(0, str(site))
    from megatron_aspo.train import main

    os._exit(main(argv))


def test_a_rank_looks_at_the_version_before_it_builds_anything(tmp_path: Path) -> None:
    (tmp_path / "vllm-0.31.0.dist-info").mkdir()
    (tmp_path / "vllm-0.31.0.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 0.31.0\n")
    (tmp_path / "run.yaml").write_text("name: t\nrollout: {engine: vllm}\nmodel: {hf_path: nowhere}\n")
    ((code, output),) = ends(1, with_another_vllm, tmp_path, [str(tmp_path / "run.yaml"), f"output_dir={tmp_path}"])
    assert code == 2
    assert [line for line in output.splitlines() if line.startswith("megatron-aspo:")] == [
        "megatron-aspo: rollout.engine=vllm was written for vllm >= 0.32 and < 0.33, and 0.31.0 is installed; "
        "install one of these, or set rollout.engine=megatron"
    ]
    assert "Traceback" not in output
