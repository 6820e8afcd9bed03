"""Settings of rewards: how answers are judged, and how scores become rewards."""

from __future__ import annotations

import os
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from megatron_aspo.config.fields import SETTINGS, Fraction
from megatron_aspo.config.rules import require


@dataclass(frozen=True, config=SETTINGS)
class _Workers:
    workers: NonNegativeInt = 0
    """Processes that judge one response at a time, on each rank. 0: the machine's cores divided by its ranks."""

    @property
    def processes(self) -> int:
        """Worker processes of this rank. Slurm may have bound it to its share of the cores already."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.workers or max(1, min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // ranks))


@dataclass(frozen=True, config=SETTINGS)
class MathRewardConfig(_Workers):
    """How mathematical answers are compared with the reference."""

    seconds: PositiveFloat = 3.0
    """Limit for one verdict, in CPU time of a worker, so that a busy machine changes no reward."""
    require_boxed: bool = True
    """Read the answer from the last `\\boxed` only. Otherwise math-verify searches responses without a box."""
    memory_mib: Annotated[int, Field(ge=256)] = 1024
    """Address space of a worker. The parser itself takes 100 MiB."""


@dataclass(frozen=True, config=SETTINGS)
class CodeRewardConfig(_Workers):
    """How programs are tested. A program is one process that can neither write files nor reach a network."""

    tests: PositiveInt | None = 16
    """Most tests of a problem for one response, drawn with the seed of the request; null is all. The assertions of a
    `check` function, as in HumanEval, count as one test."""
    test_seconds: PositiveFloat = 6.0
    """CPU time of one test, rounded up to seconds, so that a busy machine changes no reward; the limit of wall-clock
    time is five times as long. Unit tests of one problem share the limits of all."""
    total_seconds: PositiveFloat = 60.0
    """Wall-clock time of all tests of a response, including the start of the sandbox."""
    memory_mib: Annotated[int, Field(ge=64)] = 1024
    """Address space of the program. Python itself takes 30 MiB."""
    threads: PositiveInt = 8
    """Most threads of the program."""
    output_kib: PositiveInt = 1024
    """Most output of one test, on standard output, on standard error and in results each."""
    backend: Literal["bubblewrap", "subprocess"] = "bubblewrap"
    """"bubblewrap" hides the machine's files and processes. "subprocess" works where containers forbid namespaces, and
    does not: programs can read everything that the user of the run can read, and `threads` has no effect."""

    def __post_init__(self) -> None:
        test, total = self.test_seconds, self.total_seconds
        require(test <= total, f"test_seconds={test} exceeds total_seconds={total}; lower it")


@dataclass(frozen=True, config=SETTINGS)
class FunctionRewardConfig(_Workers):
    """How reward functions are called: those named by import path, those passed to `commands.train.run`, and
    reasoning-gym's. Functions that wait for a server can use many more workers than there are cores."""

    seconds: PositiveFloat = 60.0
    """Wall-clock limit of a call. A response whose call takes longer has no verdict."""


@dataclass(frozen=True, config=SETTINGS)
class RewardConfig:
    """How a verifier's score becomes a reward."""

    overlong_buffer: NonNegativeInt = 0
    """Last tokens of the response's budget, over which a penalty grows linearly from 0 to `overlong_penalty` (DAPO,
    arXiv 2503.14476, eq. 13); 0 is no penalty. DAPO uses 4096 of 20480, Archer 16."""
    overlong_penalty: NonNegativeFloat = 1.0
    """Penalty at the limit. The reward is the score minus the penalty."""
    overlong_filter: bool = False
    """Leave responses that were cut at the limit out of the loss, but not out of their group's statistics."""
    max_unjudged: Fraction = 0.5
    """Largest share of a batch's responses without a verdict; above it the run ends. Responses without a verdict are
    left out of the group statistics and of the loss."""
    math: MathRewardConfig = field(default_factory=MathRewardConfig)
    code: CodeRewardConfig = field(default_factory=CodeRewardConfig)
    function: FunctionRewardConfig = field(default_factory=FunctionRewardConfig)
