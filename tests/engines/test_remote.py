"""Rollout ranks: the weights behind each batch, bitwise equal runs, and the death of one side."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import VOCAB, ends, everywhere, run, run_config, without_times
from torch import Tensor

from megatron_aspo.commands import train as train_command
from megatron_aspo.commands.arguments import HINTS
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.load import load_config
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import CheckpointConfig, EvalConfig, OptimizerConfig, TrainConfig
from megatron_aspo.data import PromptStream
from megatron_aspo.data.problem import Problem
from megatron_aspo.data.tasks import TaskSource
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.journal.clock import Clock
from megatron_aspo.journal.folder import list_checkpoints
from megatron_aspo.journal.log import read_metrics, read_samples
from megatron_aspo.policy.metrics import UpdateMetrics, measure_mismatch
from megatron_aspo.policy.saved_batches import load_groups
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.channel import Channel
from megatron_aspo.ranks.launch import run_local
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rewards.scoring import Scorer
from megatron_aspo.rollout.batches import Batches
from megatron_aspo.rollout.build import build_engine
from megatron_aspo.rollout.remote import serve
from megatron_aspo.rollout.table import COLUMNS
from megatron_aspo.train import set_logprobs, train

pytestmark = pytest.mark.engines

STEPS = 6
CONFIG = run_config(
    # vLLM's attention on a CPU requires a head dimension of at least 32.
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
        dynamic_sampling=False,  # a model with random weights never gets a sum right
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


class WithTests:
    """Problems with a megabyte of tests each."""

    def __init__(self, seed: int) -> None:
        self.problems = TaskSource(CONFIG.data.all_sources[0], seed)

    def problem(self, position: int) -> Problem:
        problem = self.problems.problem(position)
        return replace(problem, entry={**problem.entry, "tests": "t" * (1 << 20)})


def message_sizes(channel: Channel) -> list[int]:
    """Bytes of the messages that this rank sends and receives from now on."""
    sizes: list[int] = []
    post, take = channel._post, channel._take

    def count(payload: Tensor) -> Tensor:
        sizes.append(payload.numel())
        return payload

    channel._post = lambda payload: post(count(payload))
    channel._take = lambda: count(take())
    return sizes


def take_steps(config: RunConfig) -> list[dict[str, Any]] | None:
    """Run steps of two updates each with made-up advantages; return the measurements of a training rank."""
    with distributed(config) as channel:
        assert channel is not None
        if channel.role == "rollout":
            serve(config, channel, lambda response, row: 0.0, WithTests)
            return None
        tokenizer = AsciiTokenizer()
        prompts = PromptStream(config.data, tokenizer, config.max_prompt_tokens, WithTests)
        sizes = message_sizes(channel)
        policy = Policy(config, VOCAB)
        engine = build_engine(policy, config.rollout, tokenizer, config.seed, channel)
        with Scorer(config.data, config.reward, config.rollout) as scorer:
            batches = Batches(policy, engine, prompts, scorer, config.rollout, 0, STEPS, [])
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
            set_logprobs(policy, [packed])
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
                    "tokens": [sample.token_ids.tolist() for sample in everywhere(samples)],
                    "mixed": sum(sample.versions is not None for sample in samples),
                    "staleness": batch.metrics["rollout/staleness"],
                    "mismatch": mismatch["logprob_diff_max"],
                    "first ratio": metrics.reduce()["log_ratio_max_first"],
                    "trained": (started, time.time()),
                    "sampled": (batch.started, batch.ended),
                    "waited": clock["rollout"],
                    "held out": {sample.weight_version for sample in held_out},
                    "largest message": max(sizes, default=0),
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
    [("1 + 1", 0), ("1 + 1", 2), ("1 + tp2", 1), ("tp2 + 2 replicas", 1)],
)
def test_every_batch_is_written_by_the_weights_it_should_be(layout: str, max_staleness: int) -> None:
    training, parallel, rollout = LAYOUTS[layout]
    config = config_with(parallel, **rollout, max_staleness=max_staleness, refit_bucket_mb=1, refit_checksum=True)
    by_rank = run(training + rollout["ranks"], take_steps, config)
    steps = by_rank[0]
    seen: list[int] = []
    for n, step in enumerate(steps, 1):
        writer = max(0, n - 1 - max_staleness)
        assert step["versions"] == {2 * writer}
        assert step["staleness"] == n - 1 - writer
        # vLLM's log-probs are those of exactly these weights.
        assert (step["mismatch"] < 1e-5) == (writer == n - 1)
        assert step["first ratio"] < 1e-5  # pi_old comes from the trainer at the step's initial weights
        seen += step["prompts"]
    # Tables and names of weights; no prompts, whose tests are a megabyte each.
    assert 32 * 8 * COLUMNS < steps[-1]["largest message"] < 16384
    assert steps[2]["held out"] == {6}  # evaluation uses step 3's weights, even with batches in flight
    assert len(set(seen)) == STEPS * 8  # no prompt is lost or drawn twice
    for other in by_rank[1:training]:
        assert [step["tokens"] for step in other] == [step["tokens"] for step in steps]
    assert by_rank[training:] == [None] * rollout["ranks"]
    shared = [overlap(a["trained"], b["sampled"]) for a in steps for b in steps]
    if max_staleness:
        assert max(shared) > 0.0  # training overlaps with sampling
    else:
        assert max(shared) <= 0.0


def test_weights_change_under_running_responses() -> None:
    slow = {"max_response_tokens": 22, "batch_size": 4, "oversample": 1.25}
    steps = run(2, take_steps, config_with(ranks=1, max_staleness=1, in_flight=True, **slow))[0]
    for n, step in enumerate(steps, 1):
        # A response begins at most 3 batches before its own, whose request follows the weights after step n - 2.
        assert 2 * max(0, n - 5) <= min(step["versions"]) <= max(step["versions"]) <= 2 * (n - 1)
        assert step["first ratio"] < 1e-5
    assert sum(step["mixed"] for step in steps) > 0
    assert steps[2]["held out"] == {6}
    seen = [prompt for step in steps for prompt in step["prompts"][::4]]
    assert len(set(seen)) == len(seen) == STEPS * 8


def test_unfinished_groups_go_on_after_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    slow = {"max_response_tokens": 22, "batch_size": 4, "oversample": 1.25, "max_age": 1}
    config = replace(config_with(ranks=1, max_staleness=1, **slow), output_dir=str(tmp_path), name="whole")
    no_eval = EvalConfig(every=0, at_start=False, at_end=False)
    config = replace(
        config, loss=PolicyLossConfig(entropy_coef=0.1), eval=no_eval, train=replace(CONFIG.train, steps=4)
    )
    run(2, train_in_a_world, config)
    expected = logged(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step_000004")  # as if the run had been killed before
    run(2, train_in_a_world, replace(config, checkpoint=replace(config.checkpoint, resume="auto")))
    assert logged(tmp_path / "whole") == expected
    trained = [record for record in expected if record["phase"] == "train"]
    assert max(record["rollout/older_tokens"] for record in trained) > 0.9
    assert {record["rollout/groups_in_progress"] for record in trained} == {2.0}


def train_in_a_world(config: RunConfig) -> None:
    with distributed(config) as channel:
        if channel is not None and channel.role == "rollout":
            serve(config, channel)
        else:
            train(config, [], channel)


def logged(run_dir: Path, *left_out: str) -> list[dict[str, Any]]:
    # The warm-up is cached: only the first run of a test executes it.
    records = (record for record in without_times(run_dir) if record["phase"] in ("train", "eval"))
    return [{k: v for k, v in record.items() if not k.startswith(left_out)} for record in records]


def test_colocated_and_separate_runs_are_the_same_to_the_bit(tmp_path: Path) -> None:
    def metrics_of(name: str, world_size: int, **rollout: Any) -> list[dict[str, Any]]:
        # Without dynamic sampling every step has groups; with an entropy bonus every step has a gradient.
        config = replace(config_with(**rollout), output_dir=str(tmp_path), name=name)
        run(world_size, train_in_a_world, replace(config, loss=PolicyLossConfig(entropy_coef=0.1)))
        return logged(tmp_path / name, "rollout/staleness")

    colocated = metrics_of("colocated", 1)
    trained = [record for record in colocated if record["phase"] == "train"]
    assert [record["step"] for record in trained] == list(range(1, STEPS + 1))
    assert all(record["optimizer/grad_norm"] > 1e-3 for record in trained)
    assert all(record["mismatch/logprob_diff_max"] < 1e-5 for record in trained)
    assert metrics_of("apart", 2, ranks=1) == colocated
    assert metrics_of("ahead", 2, ranks=1, max_staleness=2) != colocated


YAML = """
# Prompts of nine characters, with two numbers of two digits, are too long.
model: {hidden_size: 64, ffn_hidden_size: 96, num_attention_heads: 2, max_sequence_length: 40, init_std: 0.1}
data:
  task: chain_sum
  task_args: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2}
  prompt_template: "{expression} ="
  eval_prompts: 8
  overlong_prompts: filter
warmup: {updates: 30, batch_prompts: 32, wrong_fraction: 0.3}
rollout:
  {engine: vllm, prompts_per_step: 8, responses_per_prompt: 8, max_response_tokens: 32, dynamic_sampling: false,
   kv_cache_gb: 0.05, batch_size: 8}
loss: {rollout_correction: truncate, entropy_coef: 0.01}
optimizer: {lr: 1.0e-3, lr_warmup_updates: 0}
train: {steps: 6, mini_batch_prompts: 4, epochs: 2}
checkpoint: {every: 2, keep: 0}
eval: {every: 4}
"""
SEPARATE = ("rollout.ranks=1", "rollout.max_staleness=2")
MODES = {
    # Ranks that share vLLM's weights: the surviving one waits in shared memory, and not only in gloo.
    "colocated": ("rollout.tensor=2", "parallel.tensor=2"),
    "separate": SEPARATE,
}


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    (folder / "run.yaml").write_text(YAML)
    return [f"{folder}/run.yaml", f"name={name}", f"output_dir={folder}", f"warmup.cache_dir={folder}/cache", *more]


def train_by_command(command: list[str]) -> None:
    assert train_command.main(command) == 0


def steps_done(run_dir: Path) -> int:
    records = read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []
    return max((record["step"] for record in records if record["phase"] == "train"), default=0)


def wait_for_step(run_dir: Path, step: int) -> None:
    while steps_done(run_dir) < step:
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_a_run_whose_rank_is_killed_while_it_samples_ends_and_resumes_to_the_bit(mode: str, tmp_path: Path) -> None:
    run(2, train_by_command, arguments(tmp_path, "undisturbed", *MODES[mode]))
    expected = logged(tmp_path / "undisturbed")
    trained = [record for record in expected if record["phase"] == "train"]
    assert [record["step"] for record in trained] == [1, 2, 3, 4, 5, 6]
    assert all(record["optimizer/grad_norm"] > 1e-3 for record in trained)
    filtered = [record["data/overlong_prompts"] for record in trained]
    assert 0 < filtered[0] < filtered[1] < filtered[2] < filtered[3] < filtered[4] < filtered[5]
    if mode == "separate":
        assert [record["rollout/staleness"] for record in trained] == [0.0, 1.0, 2.0, 2.0, 2.0, 2.0]
        assert all(record["rollout/staleness_updates"] == 4 * record["rollout/staleness"] for record in trained)

    killed = subprocess.Popen(
        [sys.executable, "-m", "megatron_aspo.cli", "train", *arguments(tmp_path, "killed", *MODES[mode])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_step(tmp_path / "killed", 3)  # rank 1 is sampling: batches take longer than steps
        (victim,) = (p for p in psutil.Process(killed.pid).children() if p.environ()["RANK"] == "1")
        victim.kill()
        _, stderr = killed.communicate(timeout=15)  # no rank waits for the time limit of collectives
    finally:
        killed.kill()
    assert killed.returncode == 1
    lines = {line for line in stderr.splitlines() if line.startswith("megatron-aspo: rank")}
    assert any("rank 1 was ended by SIGKILL" in line for line in lines)
    # Rank 0 may report the lost peer before the launcher ends it.
    assert all("rank 1 was ended" in line or "the rollout ranks have ended" in line for line in lines)
    assert all(line.endswith("--resume auto") for line in lines)
    # Before the launcher ends it, a colocated rank may meet gloo's error, which has a traceback.
    assert mode == "colocated" or "Traceback" not in stderr
    assert 3 <= steps_done(tmp_path / "killed") < 6
    assert "step_000002" in [path.name for path in list_checkpoints(tmp_path / "killed" / "checkpoints")]

    run(2, train_by_command, arguments(tmp_path, "killed", *MODES[mode], "checkpoint.resume=auto"))
    assert logged(tmp_path / "killed") == expected


def test_a_failure_inside_vllm_on_one_rank_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_local("failing_vllm", arguments(tmp_path, "failed", *MODES["colocated"]), 2, HINTS["train"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megatron-aspo:")]
    (line,) = (line for line in lines if line.startswith("megatron-aspo: rank 1: "))
    assert "rank 1: vLLM failed while sampling: RuntimeError: DefaultCPUAllocator: can't allocate memory; " in line
    assert line.endswith("--resume auto")
    # Without AVX-512 vLLM's ranks are connected by gloo: rank 0 notices that rank 1 is gone, and may say so in time.
    assert all("rank 0: vLLM failed while sampling: RuntimeError" in other for other in lines if other != line)


def train_until_one_side_dies(folder: Path, victim: str) -> None:
    """Command of a rank without a launcher, which would end the other ranks."""

    def die() -> None:
        wait_for_step(folder / victim, 2)
        os.kill(os.getpid(), signal.SIGKILL)

    if (os.environ["RANK"] == "1") == (victim == "rollout"):
        threading.Thread(target=die, daemon=True).start()
    endless = ("train.steps=10000", "checkpoint.every=0", "eval.every=0")
    os._exit(train_command.main(arguments(folder, victim, *SEPARATE, *endless)))


@pytest.mark.parametrize("victim", ["training", "rollout"])
def test_without_a_launcher_the_other_side_ends_by_itself(tmp_path: Path, victim: str) -> None:
    ended = ends(2, train_until_one_side_dies, tmp_path, victim)
    (dead, _), (code, output) = ended if victim == "training" else ended[::-1]
    assert dead == -signal.SIGKILL
    assert code == 1
    (line,) = (line for line in output.splitlines() if line.startswith("megatron-aspo:"))
    assert f"the {victim} ranks have ended" in line
    assert line.endswith("--resume auto")
    assert "Traceback" not in output


def train_until_rank_1_dies(command: list[str], run_dir: Path) -> None:
    """Command of a rank without a launcher; the rollout rank is killed while it samples in or after step 3."""

    def die() -> None:
        wait_for_step(run_dir, 3)
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "1":
        threading.Thread(target=die, daemon=True).start()
    os._exit(train_command.main(command))


@pytest.mark.long
def test_a_killed_run_with_updates_in_flight_takes_every_prompt_once(tmp_path: Path) -> None:
    settings = ("rollout.ranks=1", "rollout.max_staleness=1", "rollout.in_flight=true", "rollout.oversample=1.25")
    more = (
        "train.log_samples=8",
        "train.log_samples_every=1",
        "eval.every=0",
        "eval.at_start=false",
        "warmup.updates=2",
    )
    command = arguments(tmp_path, "killed", *settings, *more)
    ended = ends(2, train_until_rank_1_dies, command, tmp_path / "killed")
    assert [code for code, _ in ended] == [1, -signal.SIGKILL]
    run(2, train_by_command, [*command, "checkpoint.resume=auto"])
    lines = list(read_samples(tmp_path / "killed"))
    trained = Counter(line["prompt"] for line in lines)
    assert sorted(line["step"] for line in lines) == sorted([1, 2, 3, 4, 5, 6] * 8)
    groups = load_groups(tmp_path / "killed" / "checkpoints" / "step_000006")
    assert groups is not None
    trained.update(group.prompt.text for group in groups["groups"])
    config = load_config(command[0], command[1:])
    stream = PromptStream(config.data, AsciiTokenizer(), config.max_prompt_tokens)
    assert trained == Counter(prompt.text for prompt in stream.draw(trained.total()))
    assert trained.total() == 6 * 8 + 2
    versions = [response["versions"] for line in lines for response in line["responses"]]
    assert max(map(len, versions)) >= 2


def refuse(folder: Path) -> None:
    os._exit(train_command.main(arguments(folder, "t", *SEPARATE, "model.num_attention_heads=4")))


def test_what_vllm_refuses_is_said_once(tmp_path: Path) -> None:
    ended = ends(2, refuse, tmp_path)
    assert [code for code, _ in ended] == [2, 2]
    (line,) = (line for _, output in ended for line in output.splitlines() if line.startswith("megatron-aspo:"))
    assert "no kernel for heads of 16" in line
