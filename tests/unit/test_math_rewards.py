"""Math rewards: the table of verdicts, and workers that hang, die or fill memory."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from benchmarks.math_rewards import measure
from megatron_aspo.errors import RunError
from megatron_aspo.rewards.math import MathRewardConfig, MathVerifier, final_answer
from megatron_aspo.rewards.verdict import Verdict

RIGHT, WRONG, NO_ANSWER, TIMEOUT = (
    Verdict(1.0, "right"),
    Verdict(0.0, "wrong"),
    Verdict(0.0, "no answer"),
    Verdict(0.0, "timeout"),
)
SECTIONS = yaml.safe_load((Path(__file__).parents[1] / "data" / "math_verdicts.yaml").read_text(encoding="utf-8"))
PAIRS = [
    (text if section == "responses" else rf"So it is \boxed{{{text}}}.", answer, verdict)
    for section, verdicts in SECTIONS.items()
    for verdict, pairs in verdicts.items()
    for text, answer in pairs
]
ENDLESS = r"\boxed{9^{9^{9}}}"


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(MathRewardConfig(workers=1)) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def hasty() -> Iterator[MathVerifier]:
    with MathVerifier(MathRewardConfig(workers=1, seconds=0.3)) as verifier:
        yield verifier


def pid_of(verifier: MathVerifier) -> int:
    return verifier._workers[0]._process.pid


def results(futures: list[Future[Verdict]]) -> list[Verdict]:
    return [future.result(120) for future in futures]


def test_the_table_is_large_and_balanced() -> None:
    right = sum(verdict == "right" for _, _, verdict in PAIRS)
    assert len(PAIRS) >= 300
    assert 0.4 < right / len(PAIRS) < 0.6


@pytest.mark.parametrize("section", SECTIONS)
def test_table(section: str, verifier: MathVerifier) -> None:
    pairs = [
        (text if section == "responses" else rf"So it is \boxed{{{text}}}.", answer, verdict)
        for verdict, pairs in SECTIONS[section].items()
        for text, answer in pairs
    ]
    judged = results([verifier.submit(text, answer) for text, answer, _ in pairs])
    # A box with nothing in it is no answer, wherever it stands in the table.
    reasons = ["wrong" if v == NO_ANSWER and section != "responses" else v.reason for v in judged]
    assert [
        (text, answer, verdict, reason)
        for (text, answer, verdict), reason in zip(pairs, reasons, strict=True)
        if reason != verdict
    ] == []
    assert all(verdict.score == (verdict.reason == "right") for verdict in judged)


def test_verdicts_do_not_depend_on_the_workers_or_the_order(verifier: MathVerifier) -> None:
    pairs = PAIRS[:: len(PAIRS) // 40]
    shuffled = random.Random(1).sample(pairs, len(pairs))
    expected = dict(zip(map(str, pairs), results([verifier.submit(t, a) for t, a, _ in pairs]), strict=True))
    with MathVerifier(MathRewardConfig(workers=2)) as many:
        judged = results([many.submit(t, a) for t, a, _ in shuffled])
    assert judged == [expected[str(pair)] for pair in shuffled]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", None),
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{1 \\}", r"1 \\"),
        (r"\boxed{" * 100_000, None),
        (r"\boxed{1}" + "}" * 100_000, "1"),
        ("x" * 5_000_000 + r"\boxed{1}" + "{" * 1_000_000, "1"),
    ],
)
def test_final_answer(response: str, answer: str | None) -> None:
    start = time.process_time()
    assert final_answer(response) == answer
    assert time.process_time() - start < 2


def test_an_answer_without_a_box_is_searched_for_if_asked() -> None:
    with MathVerifier(MathRewardConfig(workers=1, require_boxed=False)) as verifier:
        judged = results(
            [
                verifier.submit("The final answer is $\\frac{1}{2}$.", "0.5"),
                verifier.submit("The answer is 5", "4"),
                verifier.submit(r"The answer is 4, or \boxed{5}", "4"),
                verifier.submit("Who knows?", "4"),
                verifier.submit("<think>It is 4", "4"),
                verifier.submit("1 " * 1_000_000 + "The answer is 4", 4),
            ]
        )
    assert judged == [RIGHT, WRONG, WRONG, NO_ANSWER, NO_ANSWER, RIGHT]


def test_numbers_and_lists_of_answers(verifier: MathVerifier) -> None:
    cases: list[tuple[str, Any, Verdict]] = [
        ("0.5", 0.5, RIGHT),
        (r"\infty", float("inf"), RIGHT),
        ("100000", 1e5, RIGHT),
        ("7", [6, "7"], RIGHT),
        (r"\frac14", ["1/2", 0.25], RIGHT),
        ("8", [6, "7"], WRONG),
    ]
    assert results([verifier.submit(rf"\boxed{{{a}}}", b) for a, b, _ in cases]) == [v for _, _, v in cases]


@pytest.mark.parametrize("answer", ["", " ", "$", [], [""], None, True, float("nan"), {"a": 1}, [["4"]]])
def test_what_is_no_right_answer(answer: Any, verifier: MathVerifier) -> None:
    with pytest.raises(ValueError, match="answer"):
        verifier.submit(r"\boxed{4}", answer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seconds": 0}, "seconds=0 must be > 0"),
        ({"seconds": float("inf")}, "seconds=inf"),
        ({"workers": -1}, "workers=-1 must be >= 0"),
        ({"memory_mib": 100}, "memory_mib=100 must be >= 256"),
    ],
)
def test_config_is_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MathRewardConfig(**settings)


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert MathRewardConfig().processes == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert MathRewardConfig().processes == 1
    assert MathRewardConfig(workers=3).processes == 3


def test_what_takes_too_long_is_killed(hasty: MathVerifier) -> None:
    assert hasty.submit(r"\boxed{1/2}", "0.5").result(120) == RIGHT
    pids = [pid_of(hasty)]
    for answer in ("9^{9^{9}}", r"10000!!"):
        assert hasty.submit(rf"\boxed{{{answer}}}", "4").result(120) == TIMEOUT
        assert not psutil.pid_exists(pids[-1])
        pids.append(pid_of(hasty))
        assert hasty.submit(r"\boxed{1/2}", "0.5").result(120) == RIGHT
    assert len(set(pids)) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("(" * 500 + "4" + ")" * 500, "answer too deep"),
        (r"\sqrt{" * 60 + "4" + "}" * 60, "answer too deep"),
        ("7" * 3000, "answer too long"),
        ("(" * 40 + "4" + ")" * 3, "wrong"),
        ("9" * 1999, "wrong"),
        ("a" * 1999, "wrong"),
        ("^" * 1000, "wrong"),
        (r"\frac" * 300, "wrong"),
        ("(10^5)!", "wrong"),
    ],
)
def test_odd_answers_are_refused(answer: str, reason: str, verifier: MathVerifier) -> None:
    assert verifier.submit(rf"\boxed{{{answer}}}", "4").result(60) == Verdict(0.0, reason)


def test_a_long_answer_can_be_right(verifier: MathVerifier) -> None:
    assert verifier.submit(rf"\boxed{{{'7' * 3000}}}", "7" * 3000).result(60) == RIGHT


def test_the_others_of_a_batch_get_their_verdicts(hasty: MathVerifier) -> None:
    responses = [ENDLESS if i == 2 else rf"\boxed{{\frac{{{i}}}{{7}}}}" for i in range(6)]
    expected = [TIMEOUT if i == 2 else RIGHT if i == 4 else WRONG for i in range(6)]
    assert results([hasty.submit(r, r"\frac47") for r in responses]) == expected


def test_a_killed_worker_is_replaced(hasty: MathVerifier) -> None:
    assert hasty.submit(r"\boxed{1/2}", "0.5").result(60) == RIGHT
    os.kill(pid_of(hasty), signal.SIGKILL)
    assert hasty.submit(r"\boxed{1/2}", "0.5").result(60) == Verdict(0.0, "worker died", error=True)
    assert hasty.submit(r"\boxed{1/2}", "0.5").result(60) == RIGHT


def test_workers_are_renewed(hasty: MathVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_aspo.rewards.math._RECYCLE", 2)
    pids = []
    for _ in range(4):
        assert hasty.submit(r"\boxed{1/2}", "0.5").result(60) == RIGHT
        pids.append(pid_of(hasty))
    # Two verdicts each, whatever the first one had judged before.
    assert 2 <= len(set(pids)) <= 3


def test_memory_is_limited() -> None:
    with MathVerifier(MathRewardConfig(workers=1, memory_mib=256)) as verifier:
        first = psutil.Process(pid_of(verifier))
        assert verifier.submit(r"\boxed{1/2}", "0.5").result(60) == RIGHT
        assert first.rlimit(psutil.RLIMIT_AS) == (256 << 20, 256 << 20)
        # No short answer fills memory before its time runs out, so the right one does.
        assert verifier.submit(r"\boxed{1/2}", "1" * (100 << 20)).result(60) == Verdict(0.0, "worker died", error=True)
        assert not first.is_running()
        assert verifier.submit(r"\boxed{1/2}", "0.5").result(60) == RIGHT


def test_workers_import_no_torch_and_start_soon(verifier: MathVerifier) -> None:
    assert verifier.submit(r"\boxed{1/2}", "0.5").result(60) == RIGHT
    code = (
        "import sys, time; import megatron_aspo.rewards.math_worker; "
        "print(*{'torch', 'numpy', 'megatron', 'omegaconf'} & set(sys.modules)); print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, seconds = done.stdout.splitlines()
    assert heavy == ""
    assert float(seconds) < 2


def test_workers_end_with_the_trainer() -> None:
    """Killed outright, it cleans up nothing: a worker reads the end of its pipe, or its verdict's time runs out."""
    code = rf"""
import sys, time
from megatron_aspo.rewards.math import MathRewardConfig, MathVerifier
verifier = MathVerifier(MathRewardConfig(workers=2, seconds=1))
verifier.submit(r"\boxed{{1/2}}", "0.5").result()
verifier.submit(r"{ENDLESS}", "4")
print(*(worker._process.pid for worker in verifier._workers), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2
        trainer.kill()
    assert psutil.wait_procs(workers, timeout=60)[1] == []


def test_a_worker_whose_trainer_has_ended_says_nothing() -> None:
    command = [sys.executable, "-P", "-m", "megatron_aspo.rewards.math_worker", "3", "1024"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.close()  # before the worker is ready
        assert worker.wait(60) == 0
        assert worker.stderr is not None
        assert worker.stderr.read() == b""


def test_close_gives_up_what_waits() -> None:
    verifier = MathVerifier(MathRewardConfig(workers=1, seconds=60))
    futures = [verifier.submit(ENDLESS, str(i)) for i in range(3)]
    worker = psutil.Process(pid_of(verifier))
    start = time.monotonic()
    verifier.close()
    assert time.monotonic() - start < 20
    assert psutil.wait_procs([worker], timeout=10)[1] == []
    assert all(future.done() for future in futures)
    with pytest.raises(ValueError, match="closed"):
        verifier.submit(ENDLESS, "4")


def test_a_worker_that_cannot_start_is_an_error_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        MathVerifier(MathRewardConfig(workers=1)) as verifier,
        pytest.raises(RunError, match="exit code 1 before its first verdict"),
    ):
        verifier.submit(r"\boxed{1/2}", "0.5").result(60)


def test_throughput() -> None:
    """The bar; EXPERIMENTS.md has 500. CPU time, but other load costs caches."""
    assert measure(seed=1, prompts=4)["mixed"] > 200


def test_a_worker_without_memory_is_an_error_not_a_wrong_answer() -> None:
    config = MathRewardConfig(workers=1)
    object.__setattr__(config, "memory_mib", 32)  # less than its imports take
    with MathVerifier(config) as verifier, pytest.raises(RunError, match="before its first verdict"):
        verifier.submit(r"\boxed{1/2}", "0.5").result(60)
