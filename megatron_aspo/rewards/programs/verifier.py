"""Rewards for code: whether the program in a response passes its problem's tests.

with CodeVerifier(CodeRewardConfig()) as verifier:
    verdict = verifier.submit(CodeProblem.from_row(row), response, seed=0).result()

Expected results never enter a program's sandbox. Outputs are compared here. Tests written in Python run in a second
sandbox, from which they call the program.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import time
from concurrent.futures import Future
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_aspo.config.rewards import CodeRewardConfig
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.processes import JudgePool
from megatron_aspo.rewards.programs.inside.jobs import PROGRAM_ENDED
from megatron_aspo.rewards.programs.problems import CodeProblem, common_imports
from megatron_aspo.rewards.programs.sandbox import Sandbox
from megatron_aspo.rewards.verdict import Verdict, after_reasoning

__all__ = ["CodeProblem", "CodeRewardConfig", "CodeVerifier"]

_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:(python3?|py)[ \t]*)?\r?$", re.M | re.I)
_LONGEST_REPORT = 4096
"""Characters. The program can nest a longer one deeper than the trainer's stack."""
_GRACE = 0.5
"""Seconds to wait for a program's report once its tests have failed."""
_BUBBLEWRAP = (
    "bubblewrap (apt-get install bubblewrap), user namespaces or root; reward.code.backend=subprocess needs none"
)
_UNPROTECTED = "lets programs read all files of this user"
_TRIAL = """```python
import threading
thread = threading.Thread(target=print, args=("ready",))
thread.start()
thread.join()
```"""


class CodeVerifier(JudgePool):
    """Judges `config.workers` responses at a time, each in sandboxes of its own.

    Raises:
        UserError: programs cannot be run here.
    """

    def __init__(self, config: CodeRewardConfig) -> None:
        super().__init__(config.processes)
        self._config = config
        if config.backend == "subprocess":
            print(f"warning: reward.code.backend=subprocess {_UNPROTECTED}", file=sys.stderr, flush=True)
        trial = self._judge(CodeProblem("script", (("", "ready"),)), _TRIAL)
        if trial.score != 1:
            advice = f", {_BUBBLEWRAP}, but {_UNPROTECTED}" if config.backend == "bubblewrap" else ""
            raise UserError(
                f"the sandbox of reward.code cannot run a program here ({trial.reason}): it needs Linux 5.14 or newer "
                f"on x86-64 or aarch64, reward.code.memory_mib >= 256{advice}"
            )

    def submit(self, problem: CodeProblem, response: str, seed: int) -> Future[Verdict]:
        """The verdict on a response. `seed` draws the tests if the problem has more than `config.tests`."""
        return self._threads.submit(self._judge, problem.drawn(self._config.tests, seed), response)

    def output_of(self, response: str) -> str | None:
        """The output of the last Python block of a turn, and why it did not finish; None without a block. A block in
        reasoning that goes on counts too.

        Raises:
            OSError: the sandbox failed.
        """
        source = extract_program(response.rpartition("<think>")[2])
        if source is None:
            return None
        job = {"kind": "script", "input": "", "program": source, "prelude": common_imports(source)}
        with Sandbox(self, self._config) as sandbox:
            seconds, deadline = math.ceil(self._config.test_seconds), time.monotonic() + self._config.total_seconds
            reply = sandbox.run(job, seconds, deadline)
        return "\n".join(filter(None, (reply["output"].rstrip(), self._failure(reply))))

    def _judge(self, problem: CodeProblem, response: str) -> Verdict:
        """Test the program in a response, to the first test that fails. The score is 1 if all pass, else 0."""
        source = extract_program(response)
        if source is None:
            return Verdict(0.0, "no ```python block")
        program = {"program": source, "prelude": f"{common_imports(source)}\n{problem.prelude}"}
        run = self._run_script if problem.kind == "script" else self._run_tests
        deadline = time.monotonic() + self._config.total_seconds
        try:
            passed, failure = run(problem, program, deadline)
        except OSError as error:
            return Verdict(0.0, f"the sandbox failed: {error}", error=True)
        if not failure:
            return Verdict(1.0, "right")
        if time.monotonic() >= deadline:
            failure = f"all tests together are over the time limit of {self._config.total_seconds:g} s"
        return Verdict(0.0, f"test {passed + 1} of {len(problem.tests)}: {failure}")

    def _run_script(self, problem: CodeProblem, program: dict[str, Any], deadline: float) -> tuple[int, str]:
        """Run a program on each input. Returns the number of tests passed and why the next one failed."""
        with Sandbox(self, self._config) as sandbox:
            for passed, (given, expected) in enumerate(problem.tests):
                job = program | {"kind": "script", "input": given}
                reply = sandbox.run(job, math.ceil(self._config.test_seconds), deadline)
                failure = self._failure(reply)
                if failure or not same_output(reply["output"], expected):
                    return passed, failure or "wrong answer"
        return len(problem.tests), ""

    def _run_tests(self, problem: CodeProblem, program: dict[str, Any], deadline: float) -> tuple[int, str]:
        """Run tests in one sandbox, and the program in another. Returns as `_run_script`."""
        requests, calls = os.pipe()
        answers, replies = os.pipe()
        with contextlib.ExitStack() as stack:
            try:
                serving = stack.enter_context(Sandbox(self, self._config, (requests, replies)))
                testing = stack.enter_context(Sandbox(self, self._config, (answers, calls)))
            finally:
                for end in (requests, calls, answers, replies):  # a reader then sees when the writer ends
                    os.close(end)
            each, total = self._config.test_seconds, len(problem.tests)
            seconds = math.ceil(min(self._config.total_seconds, total * each) + _GRACE)
            serving.start(program | {"kind": "serve", "call_seconds": math.ceil(each)}, seconds, deadline)
            job = {"kind": "tests", "prelude": problem.prelude, "tests": problem.tests}
            reply = testing.run(job, seconds, deadline)
            report = _report(reply)
            passed = report.get("passed", 0) if reply["code"] == 0 else 0
            if passed == total:
                return total, ""
            failure = self._failure(reply) or "it did not come to its end"
            if report.get("reason") == PROGRAM_ENDED:  # its own sandbox reports the reason
                with contextlib.suppress(TimeoutError):
                    failure = self._failure(serving.reply(_GRACE)) or failure
            return passed, failure

    def _failure(self, reply: dict[str, Any]) -> str:
        """Why a program did not finish, in words; empty if it did."""
        match -reply["code"]:
            case signal.SIGKILL | signal.SIGXCPU:
                return f"over the time limit of {self._config.test_seconds:g} s"
            case signal.SIGXFSZ:
                return f"more than {self._config.output_kib} KiB of output"
            case number if number > 0:
                return f"ended by signal {number}"
        reason = _report(reply).get("reason")
        text = reason.encode(errors="replace").decode() if isinstance(reason, str) else ""
        return " ".join(text.split())[:200]


def _report(reply: dict[str, Any]) -> dict[str, Any]:
    """The report of a job's process. The program can write anything there."""
    try:
        report = json.loads(reply["report"][:_LONGEST_REPORT] or "{}")
    except (ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def extract_program(response: str) -> str | None:
    """The last Python block behind the reasoning of a response, or None."""
    text, program, start = after_reasoning(response), None, None
    for fence in _FENCE.finditer(text):  # one pattern for a block would take quadratic time
        if start is None and fence[1]:
            start = fence.end() + 1
        elif start is not None and not fence[1]:
            program, start = text[start : fence.start()], None
    return program


def same_output(output: str, expected: str) -> bool:
    """Whether two outputs are equal by LiveCodeBench's rule: line by line, either the same text but for white space
    around it, or the same numbers, as decimals without rounding."""
    lines, expected_lines = output.strip().split("\n"), expected.strip().split("\n")
    return len(lines) == len(expected_lines) and all(map(_same_line, lines, expected_lines))


def _same_line(line: str, expected: str) -> bool:
    if line.strip() == expected.strip():
        return True
    try:
        return list(map(Decimal, line.split())) == list(map(Decimal, expected.split()))
    except InvalidOperation:
        return False
