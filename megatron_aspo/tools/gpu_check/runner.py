"""Runs checks, each in a process group of its own with a time limit, and judges their numbers. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_aspo.tools.gpu_check.records import Check, Lab, Numbers, planned_ends, startable


@dataclass(frozen=True)
class Result:
    """Outcome of a check; `reason` is empty if it passed."""

    check: Check
    status: Literal["passed", "failed", "not run"]
    reason: str = ""
    seconds: float = 0.0
    numbers: Numbers = field(default_factory=dict[str, float])

    def __str__(self) -> str:
        bounded = [name for name in self.check.bounds if name in self.numbers]  # the others are in gpu_check.json
        shown = ", ".join(f"{name} {self.numbers[name]:.4g}" for name in bounded)
        text = "; ".join(filter(None, (self.reason, shown)))
        return f"{self.status:8} {self.check.name:34} {self.seconds:6.1f} s  {text}"

    def record(self) -> dict[str, Any]:
        """As `gpu_check.json` has it."""
        bounds = {name: [x if math.isfinite(x) else None for x in pair] for name, pair in self.check.bounds.items()}
        values = {"check": self.check.name, "gpus": self.check.gpus, "status": self.status, "reason": self.reason}
        return values | {"seconds": round(self.seconds, 2), "numbers": self.numbers, "bounds": bounds}


class Process:
    """The running process of a check."""

    def __init__(self, check: Check, lab: Lab, gpus: list[str], limit: float, out: Path) -> None:
        self.check, self.gpus, self.limit, self.started = check, gpus, limit, time.monotonic()
        stem = re.sub(r"\W+", "_", check.name)
        self._result, self._log = lab.path / f"{stem}.json", out / f"{stem}.log"
        self._result.unlink(missing_ok=True)
        command = [sys.executable, "-W", "ignore", "-m", "megatron_aspo.tools.gpu_check.child"]
        variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"} | os.environ
        variables |= lab.environment | check.environment
        variables |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus) if lab.device == "cuda" else ""}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_GPUS_ON_NODE"):
            variables.pop(name, None)  # of a launcher around all checks
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, check.target, json.dumps(asdict(lab)), str(self._result)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=variables,
                start_new_session=True,
            )

    def result(self) -> Result | None:
        """None while it runs."""
        code, seconds = self._process.poll(), time.monotonic() - self.started
        if code is None and seconds < self.limit:
            return None
        self.kill()
        numbers, reason = self._judge(code)
        return Result(self.check, "failed" if reason else "passed", reason, seconds, numbers)

    def kill(self) -> None:
        """End the whole process group; a process that hangs in the driver may survive."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    @property
    def survives(self) -> bool:
        return self._process.poll() is None

    def _judge(self, code: int | None) -> tuple[Numbers, str]:
        """Numbers, and the reason of a failure."""
        lines = self._log.read_text(errors="replace").strip().splitlines() or [""]
        if code is None:
            return {}, f"no end after {self.limit:.0f} s; killed (--patience 3 gives more); its last line: {lines[-1]}"
        if code < 0:
            return {}, f"ended by {signal.Signals(-code).name}"
        if code:
            return {}, f"exit code {code}: {lines[-1]}"
        try:
            numbers = {str(name): float(value) for name, value in json.loads(self._result.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            return {}, f"returned no numbers: {str(error).splitlines()[0]}"
        for name, (low, high) in self.check.bounds.items():
            value = numbers.get(name)
            if value is None or not math.isfinite(value):
                return numbers, f"{name} is {'missing' if value is None else value}"
            if not low <= value <= high:
                return numbers, f"{name} is {value:.4g}, not within {low:g} to {high:g}"
        return numbers, ""


def run_checks(checks: Sequence[Check], lab: Lab, gpus: Sequence[str], out: Path) -> Iterator[Result | Check]:
    """Run the checks, as many at a time as there are GPUs; yield each check when it starts, and its result.

    Args:
        gpus: names of the GPUs for CUDA_VISIBLE_DEVICES.
        out: folder of the logs.
    """
    too_large = [check for check in checks if check.gpus > len(gpus)]
    yield from (Result(check, "not run", f"needs {check.gpus} GPUs") for check in too_large)
    waiting, running, free = [check for check in checks if check not in too_large], list[Process](), list(gpus)
    ends, started = planned_ends(waiting, len(gpus)), time.monotonic()
    try:
        while waiting or running:
            for process in tuple(running):
                if result := process.result():
                    running.remove(process)
                    free += [] if process.survives else process.gpus
                    yield result
            unfinished = {check.name for check in waiting} | {process.check.name for process in running}
            if check := startable(waiting, len(free), unfinished):
                waiting.remove(check)
                yield check
                taken, free = free[: check.gpus], free[check.gpus :]
                limit = max(check.seconds, ends[check.name] - (time.monotonic() - started))
                running.append(Process(check, lab, taken, limit, out))
            elif waiting and not running:
                yield from (Result(check, "not run", "a process survives SIGKILL on its GPU") for check in waiting)
                return
            else:
                time.sleep(0.05)
    finally:
        for process in running:
            process.kill()


def write_results(results: Sequence[Result], machine: dict[str, Any], path: Path) -> None:
    """Write `gpu_check.json`."""
    path.write_text(json.dumps({"machine": machine, "checks": [result.record() for result in results]}, indent=1))
