"""A published folder in a user's hands: eight lines of YAML train it with vLLM, resume, and export it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run
from test_vllm import write_for_vllm
from test_with_vision import different, tensors_of

from megatron_aspo import cli
from megatron_aspo.journal.log import read_metrics

pytestmark = pytest.mark.engines

YAML = """
name: mine
model: {hf_path: FOLDER, max_sequence_length: 64}
data: {task: chain_sum, task_args: {max_terms: 2, max_digits: 1}, prompt_template: "{expression} =", eval_prompts: 4}
rollout: {engine: vllm, prompts_per_step: 4, responses_per_prompt: 4, max_response_tokens: 12, kv_cache_gb: 0.1,
          dynamic_sampling: false}
loss: {entropy_coef: 0.1}
train: {steps: 2, mini_batch_prompts: 2}
checkpoint: {every: 1}
"""


def command(words: list[str]) -> int:
    return cli.main(words)


def test_qwen3_6_with_experts_is_trained_resumed_and_exported(tmp_path: Path) -> None:
    assert len(YAML.strip().splitlines()) <= 8
    write_for_vllm("qwen3.6-moe", tmp_path / "model")
    yaml = tmp_path / "run.yaml"
    yaml.write_text(YAML.replace("FOLDER", str(tmp_path / "model")) + f"output_dir: {tmp_path}/runs\n")
    assert run(1, command, ["train", str(yaml)]) == [0]
    assert run(1, command, ["train", str(yaml), "--resume", "auto", "train.steps=3"]) == [0]
    records = [record for record in read_metrics(tmp_path / "runs" / "mine") if record["phase"] == "train"]
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert record["optimizer/grad_norm"] > 1e-3
        assert record["mismatch/logprob_diff_max"] < 1e-4
    assert run(1, command, ["export", str(yaml), str(tmp_path / "exported")]) == [0]
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "exported")
    assert before.keys() == after.keys()
    untouched = {name for name in before if name.startswith(("model.visual.", "mtp."))}
    assert different(after, before) == before.keys() - untouched
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
