"""Everything that a run prints and records."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

from omegaconf import OmegaConf
from pydantic_core import to_json

from megatron_aspo.config.journal import TRACKERS
from megatron_aspo.config.run import RunConfig
from megatron_aspo.journal.files import write_atomically, writing
from megatron_aspo.journal.log import METRICS_FILE, SAMPLES_FILE, Record, read_lines, save_provenance, set_aside
from megatron_aspo.journal.progress import progress_line
from megatron_aspo.journal.trackers import Ending, Trackers


class Journal:
    """Provenance, metrics, sampled responses and a printed line per record, as a context manager.

    Rank 0 acts; the same calls do nothing on other ranks. `metrics.jsonl` is the record; trackers get the same numbers,
    except those of the warm-up, which counts its own steps.

    Args:
        resume_step: step of the checkpoint that the run continues from. Records of later steps are dropped, because
            those steps are repeated. None renames the files of an earlier attempt and starts new ones.
    """

    def __init__(self, config: RunConfig, argv: Sequence[str], resume_step: int | None, is_rank_0: bool) -> None:
        self.is_rank_0 = is_rank_0
        if not is_rank_0:
            return
        run_dir = config.run_dir
        save_provenance(run_dir, OmegaConf.to_yaml(OmegaConf.create(asdict(config))), argv)
        metrics, samples = run_dir / METRICS_FILE, run_dir / SAMPLES_FILE
        if resume_step is None:
            set_aside(metrics, samples, *(run_dir / name for name in TRACKERS))
        else:
            _rewind(metrics, resume_step)
            _rewind(samples, resume_step)
        self._metrics, self._samples = metrics.open("ab"), samples
        self._trackers = Trackers(config, resume_step)
        self._ending: Ending = "finished"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if not self.is_rank_0:
            return
        # Every record was flushed, so a full disk has raised its error when the record was logged.
        with contextlib.suppress(OSError):
            self._metrics.close()
        self._trackers.each("close", self._ending if kind is None else "failed")

    def say(self, message: str) -> None:
        """Print a line."""
        if self.is_rank_0:
            print(message, flush=True)

    def stop(self, message: str) -> None:
        """Print why the run ends before its last step, to be resumed."""
        self.say(message)
        self._ending = "stopped"

    def record(self, phase: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """Log the metrics of step `step` of `total` and print the most important ones.

        phase: "warmup", "train", "eval" or "checkpoint".
        """
        if not self.is_rank_0:
            return
        now, metrics = time.time(), {name: float(value) for name, value in values.items()}
        with writing(self._metrics.name):
            self._metrics.write(_line({"step": step, "phase": phase, "time": now, **metrics}))
            self._metrics.flush()
        if phase != "warmup":
            self._trackers.each("log", step, {k: value for k, value in metrics.items() if math.isfinite(value)}, now)
        self.say(progress_line(phase, step, total, values))

    def record_samples(self, step: int, records: Sequence[Record]) -> None:
        """Append a step's responses to `samples.jsonl`; each has its `step`."""
        if self.is_rank_0:
            with writing(self._samples), self._samples.open("ab") as file:
                file.writelines(_line(record) for record in records)
            self._trackers.each("log_samples", step, records)

    def record_report(self, write: Callable[[Sequence[Path]], Path]) -> None:
        """Write the page of the finished run."""
        if self.is_rank_0:
            path = write([self._samples.parent])
            self.say(f"report: {path}")
            self._trackers.each("log_file", path)


def _rewind(path: Path, step: int) -> None:
    """Drop the records of later steps; warm-up is over, whatever its step."""
    if path.exists():
        with write_atomically(path) as partial, partial.open("wb") as file:
            kept = (r for r in read_lines(path) if r.get("phase") == "warmup" or r["step"] <= step)
            file.writelines(_line(record) for record in kept)


def _line(record: Record) -> bytes:
    """A line of JSON, which has neither NaN nor infinity."""
    return to_json(record, inf_nan_mode="null") + b"\n"
