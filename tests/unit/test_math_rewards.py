"""Math rewards: the table of verdicts, and judging processes that hang, die or fill memory."""

from __future__ import annotations

import os
import random
import shutil
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

import megatron_aspo
from benchmarks.math_rewards import measure
from megatron_aspo.config.rewards import CodeRewardConfig
from megatron_aspo.errors import RunError
from megatron_aspo.rewards.mathematics.verifier import MathRewardConfig, MathVerifier, final_answer
from megatron_aspo.rewards.verdict import Verdict

RIGHT, WRONG, NO_ANSWER = Verdict(1.0, "right"), Verdict(0.0, "wrong"), Verdict(0.0, "no answer")
TIMEOUT, DIED = Verdict(0.0, "timeout"), Verdict(0.0, "worker died", error=True)
SECTIONS = yaml.safe_load((Path(__file__).parents[1] / "data" / "math_verdicts.yaml").read_text(encoding="utf-8"))
TABLE = {
    section: [
        (text if section == "responses" else rf"So it is \boxed{{{text}}}.", answer, verdict)
        for verdict, pairs in verdicts.items()
        for text, answer in pairs
    ]
    for section, verdicts in SECTIONS.items()
}
PAIRS = [pair for pairs in TABLE.values() for pair in pairs]
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
    (process,) = verifier._processes
    return process.pid


def results(futures: list[Future[Verdict]]) -> list[Verdict]:
    return [future.result(120) for future in futures]


def half(verifier: MathVerifier) -> Verdict:
    """Verdict on a right answer that requires the parser."""
    return verifier.submit(r"\boxed{1/2}", "0.5").result(60)


def test_the_table_is_large_and_balanced() -> None:
    right = sum(verdict == "right" for _, _, verdict in PAIRS)
    assert len(PAIRS) >= 300
    assert 0.4 < right / len(PAIRS) < 0.6


@pytest.mark.parametrize("section", TABLE)
def test_table(section: str, verifier: MathVerifier) -> None:
    pairs = TABLE[section]
    judged = results([verifier.submit(text, answer) for text, answer, _ in pairs])
    # An empty box counts as no answer, whichever section lists it.
    reasons = ["wrong" if v == NO_ANSWER and section != "responses" else v.reason for v in judged]
    assert [(*pair, reason) for pair, reason in zip(pairs, reasons, strict=True) if reason != pair[2]] == []
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
    ("section", "name", "value"),
    [
        *((MathRewardConfig, *row) for row in [("seconds", 0), ("seconds", float("inf")), ("workers", -1)]),
        *((CodeRewardConfig, *row) for row in [("tests", 0), ("test_seconds", 61), ("memory_mib", 8), ("backend", 1)]),
    ],
)
def test_settings(section: Any, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        section(**{name: value})


USE = """
import pathlib, sys
sys.path[:0] = sys.argv[1:]
from megatron_aspo.config.rewards import MathRewardConfig
from megatron_aspo.rewards.mathematics.verifier import MathVerifier
with MathVerifier(MathRewardConfig(workers=1)) as verifier:
    print(verifier.submit(r"\\boxed{x + 1}", "1 + x").result().score)
"""


def use(folder: Path, *arguments: str) -> tuple[str, str]:
    """Output and errors of a program that judges an answer, started in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", USE, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout, done.stderr


def test_judges_have_the_package_of_their_trainer(tmp_path: Path) -> None:
    """A copy that is not installed, found by the working folder, as in a container with the packages it needs."""
    copy = tmp_path / "megatron_aspo"
    shutil.copytree(Path(megatron_aspo.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    worker = copy / "rewards" / "mathematics" / "worker.py"
    worker.write_text(worker.read_text() + "\nimport os\nos.write(2, b'the copy')\n")
    assert use(tmp_path) == ("1.0\n", "the copy")


def test_an_installed_package_does_not_hide_pythons_modules_from_judges(tmp_path: Path) -> None:
    """Old pins bring a `pathlib` from the package index."""
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (packages / "megatron_aspo").symlink_to(Path(megatron_aspo.__file__).parent)
    (packages / "pathlib.py").write_text("raise ImportError('of Python 2')")
    assert use(tmp_path, str(packages)) == ("1.0\n", "")


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Slurm binds each rank to its share or all ranks to all cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for bound in (10, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=bound: set(range(cores)))
        assert MathRewardConfig().processes == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert MathRewardConfig().processes == 1
    assert MathRewardConfig(workers=3).processes == 3


def test_what_takes_too_long_is_killed(hasty: MathVerifier) -> None:
    pids = []
    for answer in ("9^{9^{9}}", r"10000!!", "9^{9^{9}}"):
        assert half(hasty) == RIGHT
        pids.append(pid_of(hasty))
        assert hasty.submit(rf"\boxed{{{answer}}}", "4").result(120) == TIMEOUT
        assert not psutil.pid_exists(pids[-1])
    assert len(set(pids)) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("(" * 500 + "4" + ")" * 500, "answer too deep"),
        (r"\sqrt{" * 60 + "4" + "}" * 60, "answer too deep"),
        ("7" * 3000, "answer too long"),
        ("0" * 3000 + "4", "right"),
        ("(" * 40 + "4" + ")" * 3, "wrong"),
        ("9" * 1999, "wrong"),
        ("a" * 1999, "wrong"),
        ("^" * 1000, "wrong"),
        (r"\frac" * 300, "wrong"),
        ("(10^5)!", "wrong"),
    ],
)
def test_odd_answers(answer: str, reason: str, verifier: MathVerifier) -> None:
    expected = Verdict(float(reason == "right"), reason)
    assert verifier.submit(rf"\boxed{{{answer}}}", "4").result(60) == expected


def test_the_others_of_a_batch_get_their_verdicts(hasty: MathVerifier) -> None:
    responses = [ENDLESS if i == 2 else rf"\boxed{{\frac{{{i}}}{{7}}}}" for i in range(6)]
    expected = [TIMEOUT if i == 2 else RIGHT if i == 4 else WRONG for i in range(6)]
    assert results([hasty.submit(r, r"\frac47") for r in responses]) == expected


def test_a_killed_process_is_replaced(hasty: MathVerifier) -> None:
    assert half(hasty) == RIGHT
    os.kill(pid_of(hasty), signal.SIGKILL)
    assert [half(hasty), half(hasty)] == [DIED, RIGHT]


def test_processes_are_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_aspo.rewards.mathematics.verifier._RECYCLE", 2)
    pids = []
    with MathVerifier(MathRewardConfig(workers=1)) as verifier:
        for _ in range(2):
            assert half(verifier) == RIGHT
            pids.append(pid_of(verifier))
            assert half(verifier) == RIGHT
            assert not psutil.pid_exists(pids[-1])
    assert pids[0] != pids[1]


def test_memory_is_limited() -> None:
    with MathVerifier(MathRewardConfig(workers=1, memory_mib=256)) as verifier:
        assert half(verifier) == RIGHT
        first = psutil.Process(pid_of(verifier))
        assert first.rlimit(psutil.RLIMIT_AS) == (256 << 20, 256 << 20)
        # A short answer times out before it fills memory; a long right answer fills it.
        assert verifier.submit(r"\boxed{1/2}", "1" * (100 << 20)).result(60) == DIED
        assert not first.is_running()
        assert half(verifier) == RIGHT


def test_processes_import_no_torch_and_start_soon() -> None:
    code = (
        "import sys, time; import megatron_aspo.rewards.mathematics.worker; "
        "print(*{'torch', 'numpy', 'megatron', 'omegaconf', 'pydantic'} & set(sys.modules)); print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, seconds = done.stdout.splitlines()
    assert heavy == ""
    assert float(seconds) < 2


def test_processes_end_with_the_trainer() -> None:
    """A killed trainer cleans up nothing. Its judges exit at the end of their pipe, or when their time runs out."""
    code = rf"""
import sys, time
from megatron_aspo.rewards.mathematics.verifier import MathRewardConfig, MathVerifier
verifier = MathVerifier(MathRewardConfig(workers=2, seconds=1))
for verdict in [verifier.submit(r"\boxed{{1/2}}", "0.5") for _ in range(2)]:
    verdict.result()
verifier.submit(r"{ENDLESS}", "4")
print(*(process.pid for process in verifier._processes), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        judges = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
        assert len(judges) == 2
        trainer.kill()
    assert psutil.wait_procs(judges, timeout=60)[1] == []


def test_a_process_whose_trainer_has_ended_is_silent() -> None:
    command = [sys.executable, "-P", "-c", "from megatron_aspo.rewards.mathematics.worker import main; main()"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*command, "3", "1024"], **pipes) as judge:  # type: ignore[call-overload]
        assert judge.stdout
        assert judge.stderr
        judge.stdout.close()  # before the process is ready
        assert judge.wait(60) == 0
        assert judge.stderr.read() == b""


def test_close_drops_what_waits() -> None:
    verifier = MathVerifier(MathRewardConfig(workers=1, seconds=60))
    assert half(verifier) == RIGHT
    futures = [verifier.submit(ENDLESS, str(i)) for i in range(3)]
    pid = pid_of(verifier)
    start = time.monotonic()
    verifier.close()
    assert time.monotonic() - start < 20
    assert not psutil.pid_exists(pid)
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError):
        verifier.submit(ENDLESS, "4")


@pytest.mark.parametrize("cause", ["interpreter", "memory"])
def test_a_process_that_cannot_start_is_an_error_not_a_wrong_answer(
    cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MathRewardConfig(workers=1)
    if cause == "interpreter":
        monkeypatch.setattr(sys, "executable", "/bin/false")
    else:
        object.__setattr__(config, "memory_mib", 32)  # less than its imports take
    with MathVerifier(config) as verifier, pytest.raises(RunError, match="before its first verdict"):
        half(verifier)


def test_throughput() -> None:
    """docs/lab/experiments.md measures 500 verdicts a second, 25 in the loop's time. A slow CPU slows both."""

    def of_the_loop() -> float:
        begin = time.process_time()
        sum(i * i for i in range(10**6))
        return time.process_time() - begin

    before, rate = of_the_loop(), measure(seed=1, prompts=4)["mixed"]
    assert rate * max(before, of_the_loop()) > 10
