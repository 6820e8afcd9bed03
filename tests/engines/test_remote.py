"""Rollouts in ranks of their own: which weights wrote what, the same run to the bit, and a side that dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import VOCAB, ends, run, run_config

from megatron_aspo.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyLossConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_aspo.data import PromptStream
from megatron_aspo.distributed import distributed
from megatron_aspo.journal import Clock
from megatron_aspo.mismatch import measure_mismatch
from megatron_aspo.policy.trainer import Policy, UpdateMetrics
from megatron_aspo.rewards.scoring import Scorer
from megatron_aspo.rollout.engine import build_engine
from megatron_aspo.run_folder import list_checkpoints
from megatron_aspo.run_log import read_metrics
from megatron_aspo.sampling import build_batches
from megatron_aspo.serve import serve
from megatron_aspo.tokenizer import AsciiTokenizer
from megatron_aspo.train import train

pytestmark = pytest.mark.engines

STEPS = 6
CONFIG = run_config(
    # vLLM's attention on a CPU wants heads of 32 at least.
    model=ModelConfig(hidden_size=128, ffn_hidden_size=192, max_sequence_length=32, init_std=0.1),
    data=DataConfig(
        task_args={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        prompt_template="{expression} =",
        eval_prompts=8,
    ),
    rollout=RolloutConfig(
        engine="vllm",
        prompts_per_step=8,
        responses_per_prompt=4,
        max_response_tokens=12,
        dynamic_sampling=False,  # a model of random weights never sums right
        batch_size=64,
        kv_cache_gb=0.1,
    ),
    optimizer=OptimizerConfig(lr=1e-2, lr_warmup_updates=0),
    train=TrainConfig(steps=STEPS, mini_batch_prompts=4, epochs=1, max_tokens_per_micro_batch=1024),
    eval=EvalConfig(every=2, responses_per_prompt=1),
    checkpoint=CheckpointConfig(every=2, keep=0),
)


def config_with(parallel: ParallelConfig | None = None, **rollout: Any) -> RunConfig:
    return replace(CONFIG, parallel=parallel or ParallelConfig(), rollout=replace(CONFIG.rollout, **rollout))


def take_steps(config: RunConfig) -> list[dict[str, Any]] | None:
    """Steps of two updates each with made-up advantages; what a training rank saw."""
    with distributed(config) as channel:
        assert channel is not None
        if channel.role == "rollout":
            serve(config, channel)
            return None
        tokenizer = AsciiTokenizer()
        prompts = PromptStream.of(config, tokenizer)
        policy = Policy(config, VOCAB)
        engine = build_engine(policy, config.rollout, tokenizer, config.seed, channel)
        batches = build_batches(engine, prompts, Scorer(config), config, 0, [])
        engine.refit()
        steps: list[dict[str, Any]] = []
        for step in range(1, STEPS + 1):
            clock = Clock()
            batch = batches.next(clock)
            samples = [sample for group in batch.groups for sample in group]
            for i, sample in enumerate(samples):
                sample.advantage = 1.0 if i % 2 else -1.0
            started = time.time()
            packed = policy.pack(samples)
            policy.fill_logprobs(packed, "old_logprobs")
            mismatch = measure_mismatch([packed])
            metrics = UpdateMetrics()
            for _ in range(2):
                policy.train_step(packed, PolicyLossConfig(), metrics)
            engine.refit()
            held_out = engine.generate(prompts.held_out, 1, 0.0) if step == 3 else []
            steps.append(
                {
                    "versions": {sample.weight_version for sample in samples},
                    "prompts": [sample.prompt.id for sample in samples],
                    "tokens": [sample.token_ids for sample in samples],
                    "staleness": batch.metrics["rollout/staleness"],
                    "mismatch": mismatch["logprob_diff_max"],
                    "first ratio": metrics.reduce()["log_ratio_max_first"],
                    "trained": (started, time.time()),
                    "sampled": (batch.started, batch.ended),
                    "waited": clock["rollout"],
                    "held out": {sample.weight_version for sample in held_out},
                }
            )
        return steps


def overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    return min(one[1], other[1]) - max(one[0], other[0])


LAYOUTS = {
    "1 + 1": (1, ParallelConfig(), {"ranks": 1}),
    "1 + tp2": (1, ParallelConfig(), {"ranks": 2, "tensor": 2}),
    "tp2 + 2 replicas": (2, ParallelConfig(tensor=2), {"ranks": 2}),
}


@pytest.mark.parametrize(
    ("layout", "max_staleness"),
    [("1 + 1", 0), ("1 + 1", 1), ("1 + 1", 2), ("1 + tp2", 1), ("tp2 + 2 replicas", 1)],
)
def test_every_batch_is_written_by_the_weights_it_should_be(layout: str, max_staleness: int) -> None:
    training, parallel, rollout = LAYOUTS[layout]
    config = config_with(parallel, **rollout, max_staleness=max_staleness, refit_bucket_mb=1, refit_checksum=True)
    everyones = run(training + rollout["ranks"], take_steps, config)
    steps = everyones[0]
    seen: list[int] = []
    for n, step in enumerate(steps, 1):
        writer = max(0, n - 1 - max_staleness)
        assert step["versions"] == {2 * writer}
        assert step["staleness"] == n - 1 - writer
        # vLLM's log-probs are those of exactly these weights.
        assert (step["mismatch"] < 1e-5) == (writer == n - 1)
        assert step["first ratio"] < 1e-5  # pi_old is the trainer's, of the weights that the step begins with
        seen += step["prompts"]
    assert steps[2]["held out"] == {6}  # the evaluation after step 3 has its weights, whatever is in flight
    assert len(set(seen)) == STEPS * 8  # no prompt is lost or drawn twice
    for other in everyones[1:training]:
        assert [step["tokens"] for step in other] == [step["tokens"] for step in steps]
    assert everyones[training:] == [None] * rollout["ranks"]
    shared = [overlap(a["trained"], b["sampled"]) for a in steps for b in steps]
    if max_staleness:
        assert max(shared) > 0.0  # the trainer trains while the others sample
    else:
        assert max(shared) <= 0.0


def train_in_a_world(config: RunConfig) -> None:
    with distributed(config) as channel:
        if channel is not None and channel.role == "rollout":
            serve(config, channel)
        else:
            train(config, [], channel)


def without_times(run_dir: Path, *others: str) -> list[dict[str, Any]]:
    def kept(key: str) -> bool:
        return not key.startswith(("time", *others)) and not key.endswith("tokens_per_second")

    # The warm-up is cached: only the first of a test's runs does it.
    records = (record for record in read_metrics(run_dir) if record["phase"] != "warmup")
    return [{k: v for k, v in record.items() if kept(k)} for record in records]


def test_runs_are_the_same_to_the_bit(tmp_path: Path) -> None:
    def metrics_of(name: str, world_size: int, **rollout: Any) -> list[dict[str, Any]]:
        # Without dynamic sampling every step has groups; with a bonus for entropy every step has a gradient.
        config = replace(config_with(**rollout), output_dir=str(tmp_path), name=name)
        run(world_size, train_in_a_world, replace(config, loss=PolicyLossConfig(entropy_coef=0.1)))
        return without_times(tmp_path / name, "rollout/staleness")

    colocated = metrics_of("colocated", 1)
    assert [record["step"] for record in colocated if record["phase"] == "train"] == list(range(1, STEPS + 1))
    assert all(record["optimizer/grad_norm"] > 1e-3 for record in colocated if record["phase"] == "train")
    assert metrics_of("apart", 2, ranks=1) == colocated
    ahead = metrics_of("ahead", 2, ranks=1, max_staleness=2)
    assert ahead != colocated
    assert metrics_of("again", 2, ranks=1, max_staleness=2) == ahead

    # From each checkpoint on, the batches that were in flight included.
    for step in (2, 4):
        resumed = tmp_path / f"resumed{step}"
        shutil.copytree(tmp_path / "ahead", resumed)
        for checkpoint in list_checkpoints(resumed / "checkpoints"):
            if int(checkpoint.name[-6:]) > step:
                shutil.rmtree(checkpoint)
        config = replace(config_with(ranks=1, max_staleness=2), output_dir=str(tmp_path), name=resumed.name)
        config = replace(config, checkpoint=replace(config.checkpoint, resume="auto"))
        run(2, train_in_a_world, replace(config, loss=PolicyLossConfig(entropy_coef=0.1)))
        assert without_times(resumed, "rollout/staleness") == ahead


YAML = """
model: {hidden_size: 128, ffn_hidden_size: 192, max_sequence_length: 64}
data:
  task: chain_sum
  task_args: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}
  prompt_template: "{expression} ="
  eval_prompts: 16
warmup: {updates: 30, batch_prompts: 32, wrong_fraction: 0.3}
rollout:
  {engine: vllm, ranks: 1, max_staleness: 1, prompts_per_step: 8, responses_per_prompt: 8, max_response_tokens: 32,
   dynamic_sampling: false, kv_cache_gb: 0.1, batch_size: 8}
loss: {rollout_correction: truncate, entropy_coef: 0.01}
optimizer: {lr: 1.0e-3}
train: {steps: 8, mini_batch_prompts: 4, epochs: 2}
checkpoint: {every: 2, keep: 0}
eval: {every: 4}
"""


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    return [f"{folder}/run.yaml", f"name={name}", f"output_dir={folder}", f"warmup.cache_dir={folder}/cache", *more]


def start(folder: Path, name: str, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_aspo.cli", "train", *arguments(folder, name, *more)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_done(run_dir: Path) -> int:
    if not (run_dir / "metrics.jsonl").is_file():
        return 0
    return max((r["step"] for r in read_metrics(run_dir) if r["phase"] == "train"), default=0)


def wait_for_step(run_dir: Path, step: int) -> None:
    while steps_done(run_dir) < step:
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_whose_rollout_rank_is_killed_ends_and_resumes_to_the_bit(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(YAML)
    undisturbed = start(tmp_path, "undisturbed")
    _, stderr = undisturbed.communicate(timeout=400)
    assert undisturbed.returncode == 0, stderr
    expected = without_times(tmp_path / "undisturbed")
    trained = [record for record in expected if record["phase"] == "train"]
    assert [record["rollout/staleness"] for record in trained] == [0.0] + [1.0] * 7
    assert all(record["rollout/staleness_updates"] == 4 * record["rollout/staleness"] for record in trained)

    killed = start(tmp_path, "killed")
    try:
        wait_for_step(tmp_path / "killed", 3)  # the rollout rank is at a batch: those take longer than the steps
        (rollout,) = (p for p in psutil.Process(killed.pid).children() if p.environ()["RANK"] == "1")
        rollout.kill()
        start_of_end = time.monotonic()
        _, stderr = killed.communicate(timeout=60)
        assert time.monotonic() - start_of_end < 15
    finally:
        killed.kill()
    assert killed.returncode == 1
    lines = {line for line in stderr.splitlines() if line.startswith("megatron-aspo: rank")}
    of_the_launcher = (
        "megatron-aspo: rank 1 was ended by SIGKILL; the others are stopped too; what has been saved is intact, "
        "and training goes on with --resume auto"
    )
    of_the_trainer = (
        "megatron-aspo: rank 0: the rollout ranks have ended, for a reason that they tell, and so do the training "
        "ranks; what has been saved is intact, and training goes on with --resume auto"
    )
    assert of_the_launcher in lines
    assert lines <= {of_the_launcher, of_the_trainer}  # the launcher may have stopped it before
    assert "Traceback" not in stderr
    assert steps_done(tmp_path / "killed") < 8

    resumed = start(tmp_path, "killed", "--resume", "auto")
    _, stderr = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, stderr
    assert without_times(tmp_path / "killed") == expected


def train_until_one_side_dies(folder: Path, victim: str) -> None:
    """The command of a rank, without a launcher that would end the others."""
    from megatron_aspo.train import main

    def die() -> None:
        wait_for_step(folder / victim, 2)
        os.kill(os.getpid(), signal.SIGKILL)

    if (os.environ["RANK"] == "1") == (victim == "rollout"):
        threading.Thread(target=die, daemon=True).start()
    os._exit(main(arguments(folder, victim, "train.steps=10000", "checkpoint.every=0", "eval.every=0")))


@pytest.mark.parametrize("victim", ["training", "rollout"])
def test_without_a_launcher_the_other_side_ends_by_itself(tmp_path: Path, victim: str) -> None:
    (tmp_path / "run.yaml").write_text(YAML)
    ended = ends(2, train_until_one_side_dies, tmp_path, victim)
    (dead, _), (code, output) = ended if victim == "training" else ended[::-1]
    assert dead == -signal.SIGKILL
    assert code == 1
    (line,) = (line for line in output.splitlines() if line.startswith("megatron-aspo:"))
    assert f"the {victim} ranks have ended" in line
    assert "training goes on with --resume auto" in line
    assert "Traceback" not in output


def refuse(folder: Path) -> None:
    from megatron_aspo.train import main

    os._exit(main(arguments(folder, "t", "model.num_attention_heads=8", "model.num_query_groups=4")))


def test_what_vllm_refuses_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(YAML)
    ended = ends(2, refuse, tmp_path)
    assert [code for code, _ in ended] == [2, 2]
    lines = [line for _, output in ended for line in output.splitlines() if line.startswith("megatron-aspo:")]
    assert len(lines) == 1
    assert "no kernel for heads of 16" in lines[0]
