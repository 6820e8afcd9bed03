"""Responses of several turns in real ranks: token by token what engine and environment wrote, at every layout; partial
rollouts; a killed run; a run that needs its observations."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import ends, everywhere, gradients_of_steps, make_samples, open_policy, run, run_config, without_times
from sokoban_rules import Board
from test_partial_batches import config as partial_config
from test_partial_batches import train_and_die, train_whole
from test_sampler import make_prompts

from megatron_aspo.batch import OBSERVATION, Prompt, Sample
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.errors import RunError
from megatron_aspo.journal.log import read_metrics, read_samples
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.sample_log import score
from megatron_aspo.rollout.build import build_engine
from megatron_aspo.train import set_logprobs

pytestmark = pytest.mark.distributed

ROLLOUT = RolloutConfig(
    max_response_tokens=44, stop=tuple("abcdefghijklmnopqrstuvwxyz"), environment="test_played_turns:Echo", max_turns=3
)
LAYOUTS = {
    "pp2": (2, ParallelConfig(pipeline=2)),
    "dp2-cp2": (4, ParallelConfig(context=2)),
    "tp2-cp2-sp": (4, ParallelConfig(tensor=2, context=2, sequence_parallel=True)),
}


class Echo:
    """Counts the turns and says how long each was, in words with stop strings. It ends after a short turn."""

    def reset(self, prompt: Prompt) -> None:
        self.count, self.score = 0, float(prompt.id < 0)

    def step(self, response: str) -> str | None:
        self.count += 1
        self.score = min(1.0, self.count / 4 + len(response) / 100)
        return None if len(response) == 1 else f"[stop {self.count} {len(response)}]"


class Failing(Echo):
    def step(self, response: str) -> str | None:
        raise KeyError("no such tool")


class Sleeping(Echo):
    def step(self, response: str) -> str | None:
        time.sleep(0.0 if len(response) < 4 else 30.0)
        return super().step(response)


def play(weights: Path, parallel: ParallelConfig, rollout: RolloutConfig) -> Any:
    """Samples of a policy, and the trainer's log-probs of their tokens, 0 where there is no loss."""
    config = run_config(parallel, rollout=rollout)
    with open_policy(config, weights / "current") as policy:
        engine = build_engine(policy, config.rollout, AsciiTokenizer(), 1)
        samples = engine.generate(make_prompts(), 4, 1.0)
        batches = policy.pack(samples)
        set_logprobs(policy, [batches])
        table = score(policy, samples, batches)[0]
        return everywhere(samples), table, [sample.text for sample in samples]


@pytest.fixture(scope="module")
def alone(weights: Path) -> tuple[list[Sample], torch.Tensor, list[str]]:
    return run(1, play, weights, ParallelConfig(), ROLLOUT)[0]


def test_a_response_is_what_engine_and_environment_wrote(alone: tuple[list[Sample], torch.Tensor, list[str]]) -> None:
    samples, logprobs, texts = alone
    tokenizer = AsciiTokenizer()
    for sample, row, text in zip(samples, logprobs, texts, strict=True):
        versions = sample.versions if sample.versions is not None else np.zeros(sample.response_length, np.int32)
        parts = np.split(sample.token_ids, np.flatnonzero(np.diff(versions >= 0)) + 1)
        turns, observations = parts[::2], parts[1::2]
        echo = Echo()
        echo.reset(sample.prompt)
        said = [echo.step(tokenizer.decode(turn.tolist())) for turn in turns]
        assert [tuple(part.tolist()) for part in observations] == [tokenizer.encode(s or "?") for s in said[:-1]]
        assert len(turns) == sample.turns
        assert len(observations) == len(turns) - 1  # a response never ends with an observation
        assert text == "".join(tokenizer.decode(turn.tolist()) for turn in turns)
        for turn in turns[:-1]:
            assert chr(turn[-1]) in "abcdefghijklmnopqrstuvwxyz\x04"
        if sample.finish_reason == "stop":
            assert len(turns) == 3 or said[-1] is None
            assert sample.environment_score == echo.score
        assert sample.rollout_logprobs is not None
        # The trainer sees the same tokens before each of the policy's: its log-probs are the engine's.
        torch.testing.assert_close(row[: len(versions)], torch.from_numpy(sample.rollout_logprobs), rtol=0, atol=2e-5)
        assert (sample.rollout_logprobs[versions < 0] == 0).all()
    counts = [sample.turns for sample in samples]
    assert set(counts) == {1, 2, 3}
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_responses_are_the_same_at(
    layout: str, weights: Path, alone: tuple[list[Sample], torch.Tensor, list[str]]
) -> None:
    ranks, parallel = LAYOUTS[layout]
    for samples, logprobs, _ in run(ranks, play, weights, parallel, ROLLOUT):
        assert [s.token_ids.tolist() for s in samples] == [s.token_ids.tolist() for s in alone[0]]
        assert [s.turns for s in samples] == [s.turns for s in alone[0]]
        assert [s.environment_score for s in samples] == pytest.approx(
            [s.environment_score for s in alone[0]], nan_ok=True
        )
        torch.testing.assert_close(logprobs, alone[1], rtol=0, atol=2e-5)


def observed(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with every third and fourth token by an environment, and log-probs of noise there."""
    for sample in samples:
        at = np.arange(sample.response_length)
        sample.versions = np.where((at % 5 == 2) | (at % 5 == 3), OBSERVATION, 0).astype(np.int32)
    return list(samples)


def update(weights: Path, parallel: ParallelConfig, masked: bool) -> Any:
    with open_policy(config := run_config(parallel), weights / "current") as policy:
        gradients, metrics = gradients_of_steps(policy), UpdateMetrics()
        batches = policy.pack(observed(make_samples()) if masked else make_samples())
        set_logprobs(policy, [batches])
        policy.train_step(batches, replace(config.loss, aggregation="seq-mean-token-sum-norm", norm_length=8), metrics)
        return metrics.reduce(), gradients[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_without_observations_is_the_same_at(layout: str, weights: Path) -> None:
    (metrics, expected), (_, whole) = (run(1, update, weights, ParallelConfig(), masked)[0] for masked in (True, False))
    ranks, parallel = LAYOUTS[layout]
    for others, gradients in run(ranks, update, weights, parallel, True):
        assert others == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        for name, gradient in gradients.items():
            assert float((gradient - expected[name]).abs().max() / expected[name].abs().max()) < 1e-5, name
    assert max(float((whole[name] - g).abs().max() / g.abs().max()) for name, g in expected.items()) > 0.1


def fail(weights: Path, name: str) -> str:
    rollout = replace(ROLLOUT, environment=f"test_played_turns:{name}", environment_seconds=1.0)
    with open_policy(config := run_config(rollout=rollout), weights / "current") as policy:
        engine = build_engine(policy, config.rollout, AsciiTokenizer(), 1)
        try:
            samples = engine.generate(make_prompts(), 4, 1.0)
        except RunError as error:
            return str(error)
        return repr([sample.environment_score == float("inf") for sample in samples])


def test_an_environment_that_fails_ends_all_ranks_with_a_line(weights: Path) -> None:
    lines = run(2, fail, weights, "Failing")
    assert lines[0].startswith("rollout.environment=test_played_turns:Failing failed for prompt ")
    assert lines[0].endswith(": KeyError: 'no such tool'")
    assert lines[1] == lines[0]


def test_an_environment_that_is_too_slow_leaves_no_verdict(weights: Path) -> None:
    (slow, again) = run(2, fail, weights, "Sleeping")
    assert slow == again
    assert "True" in slow
    assert "False" in slow


def test_a_killed_run_of_several_turns_goes_on_to_the_bit(tmp_path: Path) -> None:
    """With partial rollouts: a checkpoint holds responses between two turns; their environments are played again."""

    def config(name: str) -> Any:
        base = partial_config(tmp_path, name)
        return replace(base, rollout=replace(base.rollout, environment="test_played_turns:Echo", max_turns=3))

    run(2, train_whole, config("whole"))
    codes = [code for code, _ in ends(2, train_and_die, config("killed"))]
    assert codes[1] == -signal.SIGKILL
    killed = config("killed")
    run(2, train_whole, replace(killed, checkpoint=replace(killed.checkpoint, resume="auto")))
    records = without_times(tmp_path / "whole")
    assert without_times(tmp_path / "killed") == records
    lines = list(read_samples(tmp_path / "whole"))
    assert list(read_samples(tmp_path / "killed")) == lines
    versions = [[v for v, _ in r["versions"]] for line in lines for r in line["responses"]]
    # Some responses have turns of two policies, with an observation between them.
    triples = [zip(spans, spans[1:], spans[2:], strict=False) for spans in versions]
    assert any(
        before >= 0 and between == OBSERVATION and after > before for t in triples for before, between, after in t
    )
    steps = [record for record in records if record["phase"] == "train"]
    assert all(1 < record["rollout/turns"] <= 3 for record in steps)
    assert all(abs(record["mismatch/logprob_diff_max"]) < 1 for record in steps)


def test_the_game_of_the_page(tmp_path: Path) -> None:
    """The YAML of docs/rollout.md, with fewer steps and prompts. Boards and scores are those of the rules."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "rollout.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(name: boxes\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(text.splitlines()) <= 8
    (tmp_path / "boxes.yaml").write_text(text)
    less = (
        "train={steps: 1, mini_batch_prompts: 4, log_samples: 99}",
        "eval={every: 0, at_start: false, at_end: false}",
    )
    fewer = ("rollout.prompts_per_step=8", "rollout.dynamic_sampling=false", "data.eval_prompts=4")
    warm = ("warmup={updates: 60, batch_prompts: 32, wrong_fraction: 0}", "checkpoint.every=0")
    command = [sys.executable, "-m", "megatron_aspo", "train", "boxes.yaml", *less, *fewer, *warm]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = list(read_samples(tmp_path / "runs" / "boxes"))
    responses = [(line["prompt"], response) for line in lines for response in line["responses"]]
    assert len(responses) == 64
    boards, scores = 0, set[float]()
    for prompt, response in responses:
        board, at, played = Board(prompt), 0, ""
        for version, count in response["versions"]:
            piece = "".join(response["tokens"][at : at + count])
            at += count
            if version == OBSERVATION:
                assert piece == str(board)
                boards += 1
                continue
            played = piece
            words = re.split(r"\W+", piece.strip("\n\4").rpartition("\n")[2])
            board.move("".join(word for word in words if set(word) <= set("LDUR")))
        if played.endswith(("\n", "\4")):  # and was not cut
            assert response["score"] == float(board.solved), response["text"]
            scores.add(response["score"])
    assert boards > 20
    assert scores == {0.0, 1.0}


@pytest.mark.long
def test_a_tiny_model_learns_to_read_its_observations(tmp_path: Path) -> None:
    """Without them no strategy finds more than 3 of 7 numbers with three guesses."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(root / "examples" / "higher_lower.py"), "80"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    records = read_metrics(tmp_path / "runs" / "higher_lower")
    accuracy = [record["eval/accuracy"] for record in records if record["phase"] == "eval"]
    assert accuracy[0] < 0.2
    assert accuracy[-1] > 0.6
    page = (tmp_path / "runs" / "higher_lower" / "report.html").read_text()
    assert '"versions": [[' in page
    assert "[-1, 1]" in page  # an observation of one token
