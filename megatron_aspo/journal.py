"""What a run tells its user and leaves on disk; the same calls are made on every rank, rank 0 acts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from omegaconf import OmegaConf

from megatron_aspo.config import RunConfig, to_dict
from megatron_aspo.errors import RunError
from megatron_aspo.progress import Progress
from megatron_aspo.run_log import Record, RunLog, save_provenance


class Journal:
    """Metrics, provenance and live progress of a run.

    Args:
        resume_step: step of the checkpoint that the run continues from; None for a new run.
        is_rank_0: the other ranks' journals do nothing.
    """

    def __init__(self, config: RunConfig, argv: list[str], resume_step: int | None, is_rank_0: bool) -> None:
        self.is_rank_0 = is_rank_0
        self._log: RunLog | None = None
        self._progress: Progress | None = None
        if is_rank_0:
            save_provenance(config.run_dir, OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), argv)
            self._log = RunLog(config.run_dir, resume_step)
            self._progress = Progress()

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None and self._log is not None:
            self._progress.__exit__(kind, error, trace)
            self._log.close()

    def say(self, message: str) -> None:
        """One line for the user, above the live panel."""
        if self._progress is not None:
            self._progress.say(message)

    def record(self, phase: str, step: int, total: int, values: dict[str, float]) -> None:
        """Log the metrics of a step and show them; phase: "warmup", "train" or "eval"."""
        if self._log is not None and self._progress is not None:
            self._log.log(step, phase, values)
            self._progress.update(phase, step, total, values)

    def record_samples(self, lines: Iterable[Record]) -> None:
        """Write responses to `samples.jsonl`; see `sample_log.records`."""
        if self._log is not None:
            self._log.log_samples(lines)


class Clock:
    """Seconds spent in named parts of a step."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if _is_out_of_memory(error):
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise RunError(
                    f"out of memory in {part}: {reason}; megatron-aspo plan says what this takes, and "
                    "docs/operations.md which settings make it less"
                ) from error
            raise
        finally:
            self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - start

    def __getitem__(self, part: str) -> float:
        return self._parts.get(part, 0.0)

    def seconds(self) -> dict[str, float]:
        """`time/<part>` of every part, and `time/step` since the clock was made."""
        parts = {f"time/{part}": seconds for part, seconds in self._parts.items()}
        return {**parts, "time/step": time.perf_counter() - self._start}


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """By name, since torch's error for a GPU is a RuntimeError of its own, and the one for a CPU any RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
