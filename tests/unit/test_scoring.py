"""From scores to rewards: length penalties, filters, user-defined verifiers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.rewards import FunctionRewardConfig, MathRewardConfig, RewardConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.rewards.scoring import Reward, Scorer, Verifier, check_judged, open_verifier, overlong_penalty
from megatron_aspo.rewards.verdict import Verdict
from megatron_aspo.rollout.advantages import fill_advantages, has_signal
from megatron_aspo.rollout.metrics import sample_metrics

CONFIG = RunConfig("x", rollout=RolloutConfig(max_response_tokens=20))


def scorer_of(config: RunConfig, reward: Reward | None = None) -> Scorer:
    return Scorer(config.data, config.reward, config.rollout, reward)


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0), (15, 0), (16, 0), (17, 0.125), (18, 0.25), (20, 0.5), (25, 0.5)]
)
def test_overlong_penalty_of_a_buffer_of_four(length: int, penalty: float) -> None:
    config = RewardConfig(overlong_buffer=4, overlong_penalty=0.5)
    assert overlong_penalty(length, config, 20) == penalty
    assert overlong_penalty(length, RewardConfig(), 20) == 0


def test_the_penalty_is_of_the_reward_and_not_of_the_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text("def says(response, row):\n    return row['answer'] in response\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = replace(
        CONFIG,
        data=DataConfig(path="x", reward="my_rewards:says"),
        reward=RewardConfig(overlong_buffer=10),
    )
    prompt = Prompt(0, "", (), {"answer": "yes"}, "my_rewards:says")
    group = [
        Sample(prompt, 0, np.ones(n, np.int32), "stop", text=text)
        for n, text in ((15, "yes"), (20, "oh yes"), (3, "no"))
    ]
    with scorer_of(config) as scorer:
        scorer.score(group)
    assert [s.score for s in group] == [1, 1, 0]
    assert [s.reward for s in group] == [0.5, 0, 0]
    assert has_signal(group)
    assert not has_signal(group[:2])  # both right: DAPO and Archer drop such groups
    fill_advantages([group[:2]])
    assert group[0].advantage == pytest.approx(0.25 / (0.5 / 2**0.5), rel=1e-4)
    sys.modules.pop("my_rewards")


def test_a_response_without_a_verdict_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    math = MathRewardConfig(workers=1)
    config = replace(CONFIG, data=DataConfig(path="x", reward="math"), reward=RewardConfig(math=math))
    prompt = Prompt(0, "", (), {"answer": "0.5"}, "math")
    samples = [Sample(prompt, 0, np.ones(1, np.int32), "stop", text=rf"\boxed{{{text}}}") for text in ("1/2", "1/3")]
    with scorer_of(config) as scorer:
        scorer.score(samples)
        assert [(s.score, s.unjudged) for s in samples] == [(1, ""), (0, "")]
        assert capsys.readouterr().err == ""
        (worker,) = (
            p for p in psutil.Process().children() if any("mathematics.worker" in word for word in p.cmdline())
        )
        worker.kill()
        scorer.score(samples)
    assert [(s.score, s.unjudged) for s in samples] == [(0, "worker died"), (0, "")]
    assert "1 of 2 responses could not be judged: worker died" in capsys.readouterr().err
    check_judged(samples, config.reward)
    with pytest.raises(RunError, match=r"worker died.*reward\.max_unjudged=0\.49"):
        check_judged(samples, RewardConfig(max_unjudged=0.49))
    samples = [replace(samples[0], unjudged=reason) for reason in ("a", "b", "", "b", "c")]
    with pytest.raises(RunError, match="4 of 5 responses could not be judged: b;"):
        check_judged(samples, RewardConfig())


class Silent:
    """A verifier that cannot judge and does not say why."""

    def submit(self, sample: Sample) -> Future[Verdict]:
        verdict: Future[Verdict] = Future()
        verdict.set_result(Verdict(0.25, "", error=True))
        return verdict

    def close(self) -> None: ...


def test_a_fault_without_a_reason_is_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [Sample(Prompt(0, "", (), {}), 0, np.ones(1, np.int32), "stop")]
    with scorer_of(CONFIG, Silent()) as scorer:
        scorer.score(samples)
    assert samples[0].unjudged == "no reason was given"
    assert "1 of 1 responses could not be judged: no reason was given" in capsys.readouterr().err


def test_repetition_is_measured_by_the_scorer() -> None:
    words = " ".join(["left right"] * 30)  # 60 words: 41 grams of 20, two of which differ
    sample = Sample(Prompt(0, "", (), {}), 0, np.ones(5, np.int32), "stop", text=words)
    with scorer_of(CONFIG, lambda response, row: 0.0) as scorer:
        scorer.score([sample])
    assert (sample.repetition, sample.repetition_words) == (1 / 2, pytest.approx(39 / 41))


def test_observations_do_not_count_as_repetition() -> None:
    tokens = np.array([1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 7, 8, 9, 10], np.int32)
    versions = np.array([3] * 5 + [-1] * 6 + [3] * 4, np.int32)
    samples = [
        Sample(Prompt(0, "", (), {}), 0, tokens, "stop", versions=versions),
        Sample(Prompt(0, "", (), {}), 0, tokens, "stop"),
    ]
    with scorer_of(CONFIG, lambda response, row: 0.0) as scorer:
        scorer.score(samples)
    assert [sample.repetition for sample in samples] == [0.0, pytest.approx(2 / 12)]


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such", "json:__doc__", "json:loads"])
def test_a_function_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=name):
        scorer_of(replace(CONFIG, data=DataConfig(path="x", reward=name)))


def test_a_reward_of_the_callers_own_judges_all() -> None:
    group = [
        Sample(Prompt(0, "", (), {"answer": "1"}, kind), 0, np.ones(1, np.int32), "stop", text="1")
        for kind in ("math", "code")
    ]
    with Scorer(
        CONFIG.data, CONFIG.reward, CONFIG.rollout, lambda response, row: 0.25 * int(row["answer"]) + len(response)
    ) as scorer:
        scorer.score(group)
    assert [s.score for s in group] == [1.25, 1.25]
    with pytest.raises(UserError, match=r"<lambda>\(response\) must take \(response, row\)"):
        scorer_of(CONFIG, cast("Any", lambda response: 1))


def test_a_verifier_of_the_callers_own_is_closed() -> None:
    class Counts:
        """A verifier that returns a response's length on request."""

        closed = 0

        def submit(self, sample: Sample) -> Future[Verdict]:
            self.last: Future[Verdict] = Future()
            self.last.set_result(Verdict(float("inf") if sample.text == "?" else len(sample.text), ""))
            return self.last

        def close(self) -> None:
            self.closed += 1

    verifier = Counts()
    samples = [Sample(Prompt(0, "", (), {}), 0, np.ones(1, np.int32), "stop", text=text) for text in ("four", "?")]
    with scorer_of(CONFIG, verifier) as scorer:
        scorer.score(samples[:1])
        assert samples[0].score == 4
        with pytest.raises(RunError, match=r"the reward of the response '\?' is inf; it must be finite"):
            scorer.score(samples)
    assert verifier.closed == 1


def test_a_verifier_is_named_by_its_class_and_reports_further_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_verifier.py").write_text(
        "from concurrent.futures import Future\n"
        "from megatron_aspo.rewards.verdict import Verdict\n"
        "class Words:\n"
        "    def submit(self, sample):\n"
        "        future, words = Future(), sample.text.split()\n"
        "        numbers = {'words': float(len(words))} | ({'longest': max(map(len, words))} if words else {})\n"
        "        future.set_result(Verdict(1.0, '', metrics=numbers))\n"
        "        return future\n"
        "    def close(self):\n"
        "        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = DataConfig(path="x", reward="my_verifier:Words")
    prompt = Prompt(0, "", (), {}, data.reward)
    samples = [Sample(prompt, 0, np.ones(1, np.int32), "stop", text=text) for text in ("one", "", "three four")]
    with scorer_of(replace(CONFIG, data=data)) as scorer:
        scorer.score(samples)
    assert [sample.metrics for sample in samples] == [
        {"words": 1, "longest": 3}, {"words": 0}, {"words": 2, "longest": 5},
    ]  # fmt: skip
    metrics = sample_metrics(samples, "eval")
    assert (metrics["eval/words"], metrics["eval/longest"]) == (1, 4)
    samples[0].unjudged = "worker died"
    assert sample_metrics(samples, "eval")["eval/longest"] == 5
    sys.modules.pop("my_verifier")


def sample_of(text: str) -> Sample:
    return Sample(Prompt(7, "", (), {"answer": 1}, data_source="mine"), 0, np.array([]), "stop", text=text)


@pytest.fixture
def hasty() -> Iterator[Verifier]:
    """A closure with a limit of half a second and one worker."""

    def judge(response: str, row: dict[str, Any]) -> float:
        if response == "hangs":
            while True:
                pass
        if response == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if response == "leaves":
            sys.exit(3)
        return float(response) + row["answer"]

    config = RewardConfig(function=FunctionRewardConfig(seconds=2, workers=1))
    verifier = open_verifier(judge, config, 0)
    yield verifier
    verifier.close()


def test_a_function_that_hangs_or_dies_costs_one_verdict(hasty: Verifier) -> None:
    futures = [hasty.submit(sample_of(text)) for text in ("1", "hangs", "2", "dies", "3")]
    verdicts = [future.result(60) for future in futures]
    assert [verdict.score for verdict in verdicts] == [2, 0, 3, 0, 4]
    assert [verdict.error for verdict in verdicts] == [False, True, False, True, False]
    assert "judge took more than reward.function.seconds=2" in verdicts[1].reason
    assert "judge ended with exit code -9" in verdicts[3].reason


@pytest.mark.parametrize(
    ("text", "failure"), [("no number", "ValueError.*no number"), ("leaves", "SystemExit"), ("[" * 99, "ValueError")]
)
def test_what_a_function_raises_is_named_with_the_sample(hasty: Verifier, text: str, failure: str) -> None:
    with pytest.raises(RunError, match=rf"judge failed for the response '.*' to prompt 7 of mine: {failure}") as raised:
        hasty.submit(sample_of(text)).result(60)
    assert "in judge" in str(raised.value.__cause__)  # the worker's traceback


def test_functions_are_called_side_by_side() -> None:
    config = replace(CONFIG, reward=RewardConfig(function=FunctionRewardConfig(workers=8)))

    def wait(response: str, row: dict[str, Any]) -> float:
        time.sleep(1.5)
        return os.getpid()

    samples = [sample_of("") for _ in range(16)]
    with scorer_of(config, wait) as scorer:
        start = time.monotonic()
        scorer.score(samples)
        assert time.monotonic() - start < 1.5 * len(samples) - 4  # sequentially they take 1.5 s each
        workers = {int(sample.score) for sample in samples}
        assert len(workers) == 8
    assert not any(psutil.pid_exists(pid) for pid in workers)


def fail_before_the_first_verdict() -> None:
    verifier = open_verifier(lambda response, row: 1.0, RewardConfig(), 0)
    sys.exit(3 if verifier else 4)  # in place of a setting's error


def test_a_rank_that_fails_before_it_scores_ends() -> None:
    """Python's end of a forked process waits for all its own forks, and the workers wait for work."""
    process = multiprocessing.get_context("fork").Process(target=fail_before_the_first_verdict)
    process.start()
    try:
        process.join(20)
        assert process.exitcode == 3
    finally:
        process.kill()


def test_workers_end_with_their_rank(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from megatron_aspo.config.rewards import RewardConfig\n"
        "from megatron_aspo.rewards.scoring import open_verifier\n"
        "from megatron_aspo.batch import Prompt, Sample\n"
        "verifier = open_verifier(lambda response, row: os.getpid(), RewardConfig(), 0)\n"
        "print(verifier.submit(Sample(Prompt(0, '', (), {}), 0, (), 'stop')).result().score, flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None
        worker = psutil.Process(int(float(rank.stdout.readline())))
        rank.kill()
    assert psutil.wait_procs([worker], timeout=10)[1] == []
