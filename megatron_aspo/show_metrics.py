"""`megatron-aspo metrics`: a run's metrics as a table in the terminal, a line a step."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_aspo.errors import UserError
from megatron_aspo.run_log import Record, read_metrics

_NO_METRICS = ("step", "phase", "time")


def metrics_table(run_dir: Path, patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Lines of text: of each record that has any of the metrics; without patterns the names of all that were logged.

    Args:
        patterns: names, in the order of the columns; * stands for anything.

    Returns:
        The lines, and a note for each pattern that fits no metric: a run logs some of them under conditions only.

    Raises:
        UserError: it is no run, it has logged nothing, or no pattern fits.
    """
    records = read_metrics(run_dir)
    known = list(dict.fromkeys(name for record in records for name in record if name not in _NO_METRICS))
    if not known:
        raise UserError(f"{run_dir} has logged nothing yet; wait for its first step to end")
    if not patterns:
        return sorted(known), []
    names: list[str] = []
    notes: list[str] = []
    for pattern in patterns:
        found = [name for name in known if fnmatchcase(name, pattern)]
        names += found
        if not found:
            near = difflib.get_close_matches(pattern, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"megatron-aspo metrics {run_dir} lists what it has"
            notes.append(f"{run_dir} has logged no {pattern}; {hint}")
    if not names:
        raise UserError("; ".join(notes))
    rows = [["phase", "step", *names]]
    rows += [[r["phase"], str(r["step"]), *(_text(r, name) for name in names)] for r in records if r.keys() & names]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows], notes


def _text(record: Record, name: str) -> str:
    value: Any = record.get(name, "-")
    if not isinstance(value, int | float):
        return "null" if value is None else value
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"  # no powers of ten for what one counts
