"""Threads that judge, and the processes that they start."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self


class JudgePool:
    """Base of the verifiers whose threads hand responses to processes."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="judge")
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def start(
        self,
        command: list[str],
        stderr: int | None = None,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """A process with pipes, which `end` or `close` ends."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            pass_fds=pass_fds,
            env=env,
            process_group=0,
        )
        self._processes.add(process)
        if self._closed:
            kill(process)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(BrokenPipeError), process:  # closes the pipes and waits
            kill(process)
        self._processes.discard(process)

    def close(self) -> None:
        """Drop the requests without a verdict, and end the processes."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in tuple(self._processes):
            kill(process)
        self._threads.shutdown()
        for process in tuple(self._processes):
            self.end(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of `JudgePool.start` and its group.

    A child that bubblewrap has just made is not yet tied to it: left alone it would wait forever, with the pipes open.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
