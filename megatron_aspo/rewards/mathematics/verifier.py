"""Rewards of mathematical answers: the last boxed answer of a response, compared with the right one.

with MathVerifier(MathRewardConfig()) as verifier:
    verdict = verifier.submit(response, "1/2").result()
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
import re
import signal
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import megatron_aspo
from megatron_aspo.config.rewards import MathRewardConfig
from megatron_aspo.errors import RunError
from megatron_aspo.rewards.processes import JudgePool
from megatron_aspo.rewards.verdict import Verdict, after_reasoning

__all__ = ["MathRewardConfig", "MathVerifier", "final_answer"]

MAX_ANSWER = 2_000
"""Characters of an answer. Benchmarks' answers are far shorter, and the parser's time grows with the length."""

MAX_DEPTH = 50
"""Nested brackets of an answer. The parser takes minutes for some hundreds."""

_RECYCLE = 20_000
"""Verdicts of a process. The parser's tables only grow."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_INTEGER = re.compile(r"[+-]?[0-9]+")

type Answer = str | int | float

_PACKAGE = Path(megatron_aspo.__file__).parent


class MathVerifier(JudgePool):
    """Judges several responses at a time, each thread in a process of its own. Verdicts do not depend on their number.

    Pools of the standard library and pebble do not fit. Forked workers hold torch's address space, which leaves no
    memory limit to set; spawned ones import the trainer's main module, with torch, and take over its hash seed.
    """

    def __init__(self, config: MathRewardConfig) -> None:
        super().__init__(config.processes)
        self._config = config
        start = "from megatron_aspo.rewards.mathematics.worker import main; main()"
        self._command = [sys.executable, "-P", "-c", start, str(config.seconds), str(config.memory_mib)]
        self._worker = threading.local()

    def submit(self, response: str, answer: Answer | list[Answer] | tuple[Answer, ...]) -> Future[Verdict]:
        """The verdict on a response, given the right answer or a list of accepted ones.

        Raises:
            ValueError: the right answer is empty, or neither text nor a number.
            RunError: (of the future) the processes cannot start.
        """
        accepted = [text_of(a) for a in (answer if isinstance(answer, list | tuple) else [answer])]
        if not accepted:
            raise ValueError("answer: the list of accepted answers is empty")
        boxed = final_answer(response)
        if boxed is None and not self._config.require_boxed:
            # Answers stand at the end, and the patterns take more than linear time.
            return self._threads.submit(self._request, False, after_reasoning(response)[-MAX_ANSWER:], accepted)
        verdict = _judge_without_parser(boxed, accepted)
        if verdict is None:
            return self._threads.submit(self._request, True, boxed, accepted)
        done: Future[Verdict] = Future()
        done.set_result(verdict)
        return done

    def _request(self, *request: Any) -> Verdict:
        """The verdict of this thread's process, which is replaced once it has ended."""
        worker = self._worker
        process = getattr(worker, "process", None) or self._start_worker()
        try:
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            verdict = pickle.load(process.stdout)
            worker.verdicts_left -= 1
        except (EOFError, OSError, pickle.UnpicklingError):
            timeout = process.wait() in (-signal.SIGPROF, -signal.SIGALRM)
            verdict = Verdict(0.0, "timeout") if timeout else Verdict(0.0, "worker died", error=True)
            worker.verdicts_left = 0
        if worker.verdicts_left == 0:
            self.end(process)
            worker.process = None
        return verdict

    def _start_worker(self) -> Any:
        # With the same hash seed everywhere sets have the same order; sympy's steps follow it. `-P` leaves out the
        # working folder, where `python -m` has found this package if it is not installed.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        if _PACKAGE.parent.name not in ("site-packages", "dist-packages"):
            # A folder of packages in front would hide modules of Python's own.
            inherited = filter(None, [os.environ.get("PYTHONPATH")])
            environment["PYTHONPATH"] = os.pathsep.join([str(_PACKAGE.parent), *inherited])
        process: Any = self.start(self._command, env=environment)
        try:
            pickle.load(process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise RunError(
                f"a process that judges mathematics ended with exit code {process.wait()} before its first verdict; "
                "its message is on standard error"
            ) from None
        self._worker.process, self._worker.verdicts_left = process, _RECYCLE
        return process


def final_answer(response: str) -> str | None:
    """Contents of the last `\\boxed{...}` after the reasoning; None if there is none, it is empty or not closed."""
    text = after_reasoning(response)
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    depth, start = 1, boxes[-1].end()
    for match in _BRACE.finditer(text, start):  # braces and escaped characters
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()].strip() or None
    return None


def text_of(answer: Answer) -> str:
    """Return the text that responses are compared with; ValueError for anything that cannot be a right answer."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"answer={answer!r} must be text, a number or a list of those")
    if isinstance(answer, float) and math.isnan(answer):
        raise ValueError("answer=nan is not an answer")
    text = str(answer).strip()
    boxed = final_answer(text) if "box" in text else None
    text = text if boxed is None else boxed
    if not _normalized(text):
        raise ValueError(f"answer={answer!r} is empty")
    return text


def _judge_without_parser(answer: str | None, accepted: list[str]) -> Verdict | None:
    """The verdict where no parser is needed, else None."""
    if answer is None:
        return Verdict(0.0, "no answer")
    normalized, *right = map(_normalized, (answer, *accepted))
    if normalized in right:
        return Verdict(1.0, "right")
    if len(answer) > MAX_ANSWER:
        return Verdict(0.0, "answer too long")
    if max(itertools.accumulate((c in "([{") - (c in ")]}") for c in answer), default=0) > MAX_DEPTH:
        return Verdict(0.0, "answer too deep")
    if all(map(_INTEGER.fullmatch, (normalized, *right))):
        return Verdict(0.0, "wrong")
    return None


def _normalized(text: str) -> str:
    """`text` without dollar signs and space around it, and without an integer's plus and leading zeros."""
    text = text.strip().strip("$").strip()
    if _INTEGER.fullmatch(text):
        digits = text.lstrip("+-").lstrip("0") or "0"
        return f"-{digits}" if text.startswith("-") and digits != "0" else digits
    return text
