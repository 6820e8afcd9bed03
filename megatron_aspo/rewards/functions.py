"""Reward functions, called in worker processes with a time limit.

The workers are forks of the rank, so any function can be passed, closures too. Changes that a call makes stay in its
worker. Workers cannot use a GPU. A reward that needs shared state or a GPU is a `Verifier`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.util import Finalize
from typing import Any

from pebble import ProcessExpired, ProcessPool

from megatron_aspo.batch import Sample
from megatron_aspo.config.rewards import FunctionRewardConfig
from megatron_aspo.errors import RunError
from megatron_aspo.rewards.verdict import Verdict

RewardFunction = Callable[[str, dict[str, Any]], float]
"""(response's text, prompt's entry: the row of a file) -> score."""

_PR_SET_PDEATHSIG = 1


class FunctionVerifier:
    """Calls `function` on `config.processes` responses at a time. Messages call it `name`."""

    def __init__(self, function: RewardFunction, name: str, config: FunctionRewardConfig) -> None:
        self._name, self._seconds = name, config.seconds
        context = multiprocessing.get_context("fork")
        self._pool = ProcessPool(config.processes, context=context, initializer=_start, initargs=(function,))
        assert self._pool.active  # starts the workers: forks made before the rank has a model
        # A rank that fails before anyone can close this would wait for its workers at its end.
        self._end = Finalize(None, self._stop, exitpriority=0)

    def submit(self, sample: Sample) -> Future[Verdict]:
        """The verdict on a response; an error if the call took too long or its worker ended.

        Raises:
            RunError: (of the future) the function raised an exception.
        """
        verdict: Future[Verdict] = Future()
        call = self._pool.schedule(_call, args=(sample.text, sample.prompt.entry), timeout=self._seconds)
        call.add_done_callback(lambda done: self._finish(done, sample, verdict))
        return verdict

    def close(self) -> None:
        self._end()

    def _stop(self) -> None:
        self._pool.stop()
        self._pool.join()

    def _finish(self, call: Future[tuple[float, str, str]], sample: Sample, verdict: Future[Verdict]) -> None:
        if call.cancelled():
            verdict.cancel()
            return
        try:
            score, failure, trace = call.result()
        except TimeoutError:
            reason = f"{self._name} took more than reward.function.seconds={self._seconds:g}"
            verdict.set_result(Verdict(0.0, reason, error=True))
        except ProcessExpired as error:
            reason = f"the worker of {self._name} ended with exit code {error.exitcode}"
            verdict.set_result(Verdict(0.0, reason, error=True))
        except Exception as error:  # an entry that cannot be pickled
            verdict.set_exception(self._failure(sample, repr(error), ""))
        else:
            if failure:
                verdict.set_exception(self._failure(sample, failure, trace))
            else:
                verdict.set_result(Verdict(score, ""))

    def _failure(self, sample: Sample, failure: str, trace: str) -> RunError:
        source = f" of {sample.prompt.data_source}" if sample.prompt.data_source else ""
        where = f"the response {sample.text[:60]!r} to prompt {sample.prompt.id}{source}"
        error = RunError(f"the reward {self._name} failed for {where}: {failure}")
        error.__cause__ = RuntimeError(f"in a worker\n{trace}")
        return error


_function: RewardFunction


def _start(function: RewardFunction) -> None:
    global _function
    _function = function
    if sys.platform == "linux":  # a worker's copies of the rank's connections would hide the rank's end from the others
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # instead of the rank's handlers
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # a fork lacks the threads that OpenMP would wait for


def _call(response: str, entry: dict[str, Any]) -> tuple[float, str, str]:
    """(score, exception, traceback) of a call; the texts are empty if it returned."""
    try:
        return float(_function(response, entry)), "", ""
    except (Exception, SystemExit) as error:  # whatever the user's function raises
        return 0.0, repr(error), traceback.format_exc()
