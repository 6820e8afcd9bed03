"""Settings of rewards: how answers are judged, and what is made of the score."""

from __future__ import annotations

import math
import os
import typing
from dataclasses import dataclass, field
from typing import Literal

from megatron_aspo.config_rules import require, require_positive

SandboxBackend = Literal["bubblewrap", "subprocess"]


@dataclass(frozen=True)
class MathRewardConfig:
    """How answers are judged.

    Attributes:
        seconds: a verdict's limit, of a worker's CPU time, so that a busy machine changes no reward.
        workers: processes that judge; 0 is the machine's cores over its ranks.
        require_boxed: the answer is what the last `\\boxed` holds. Without it a response that has no box is searched
            for an answer, with the patterns of math-verify.
        memory_mib: address space of a worker.
    """

    seconds: float = 3.0
    workers: int = 0
    require_boxed: bool = True
    memory_mib: int = 1024

    def __post_init__(self) -> None:
        require(0 < self.seconds < math.inf, f"seconds={self.seconds} must be > 0 and finite")
        require(self.workers >= 0, f"workers={self.workers} must be >= 0; 0 is the machine's cores over its ranks")
        require(self.memory_mib >= 256, f"memory_mib={self.memory_mib} must be >= 256: the parser itself takes 100")

    @property
    def processes(self) -> int:
        """How many workers this rank has."""
        return self.workers or _cores_of_a_rank()


@dataclass(frozen=True)
class CodeRewardConfig:
    """How programs are tested. A program is one process that can neither write files nor reach a network.

    Attributes:
        tests: most tests of a problem that a response takes, drawn with the seed of the request; null is all. Of
            `check` functions, as HumanEval has them, all assertions count as one test.
        test_seconds: CPU time of one test, so that a busy machine changes no reward; a program that waits gets five
            times that much. Of unit tests a problem has one such time for all its tests together, times their number.
        total_seconds: wall clock, for all tests of a response with the start of the sandbox.
        memory_mib: address space of the program.
        threads: most threads of the program.
        output_kib: what the program may write to standard output, standard error and as results, together and for
            one test.
        workers: responses judged at a time; 0 is the machine's cores over its ranks.
        backend: "bubblewrap" hides the host's files and processes; "subprocess" does not: programs can read
            whatever the user of the run can. Only for programs you trust, or inside a container that holds nothing.
    """

    tests: int | None = 16
    test_seconds: float = 6.0
    total_seconds: float = 60.0
    memory_mib: int = 1024
    threads: int = 8
    output_kib: int = 1024
    workers: int = 0
    backend: SandboxBackend = "bubblewrap"

    def __post_init__(self) -> None:
        backends = typing.get_args(SandboxBackend)
        require(self.backend in backends, f"backend={self.backend!r} is not one of {', '.join(backends)}")
        require(
            0 < self.test_seconds <= self.total_seconds,
            f"test_seconds={self.test_seconds} must be > 0 and at most total_seconds={self.total_seconds}",
        )
        require(self.memory_mib >= 64, f"memory_mib={self.memory_mib} must be >= 64: Python itself takes some 30")
        require(self.tests is None or self.tests >= 1, f"tests={self.tests} must be > 0, or null for all")
        require_positive(self, "threads", "output_kib")
        require(self.workers >= 0, f"workers={self.workers} must be >= 0; 0 is the machine's cores over its ranks")

    @property
    def processes(self) -> int:
        """How many responses this rank judges at a time."""
        return self.workers or _cores_of_a_rank()


@dataclass(frozen=True)
class RewardConfig:
    """What is made of a verifier's score.

    Attributes:
        overlong_buffer: the last tokens of the response's budget, over which a penalty grows linearly from 0 to
            `overlong_penalty` (DAPO, arXiv 2503.14476, eq. 13); 0 is no penalty. DAPO takes 4096 of 20480, Archer 16.
        overlong_penalty: the penalty at the limit; the reward is the score less it.
        overlong_filter: responses that were cut at the limit do not enter the loss. They still count in their
            group's mean and standard deviation.
        math, code: how these verifiers work.
    """

    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    overlong_filter: bool = False
    math: MathRewardConfig = field(default_factory=MathRewardConfig)
    code: CodeRewardConfig = field(default_factory=CodeRewardConfig)

    def __post_init__(self) -> None:
        require(self.overlong_buffer >= 0, f"overlong_buffer={self.overlong_buffer} must be >= 0")
        require(self.overlong_penalty >= 0, f"overlong_penalty={self.overlong_penalty} must be >= 0")


def _cores_of_a_rank() -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
