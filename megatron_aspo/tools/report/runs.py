"""The runs of a report, read from their folders."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_aspo.errors import UserError
from megatron_aspo.journal.folder import CONFIG_FILE
from megatron_aspo.journal.log import Record, read_metrics

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""From Okabe and Ito's palette: readable on white and near-black, distinguishable with every common kind of colour
vision."""

STYLES = ("solid", "dashed", "dotted")
"""Styles of lines, in CSS and matplotlib. Runs beyond the palette repeat its colours in another style."""


@dataclass(frozen=True)
class Run:
    """A run folder with the name and look of the run in the report.

    Attributes:
        label: the folder's name, or its path if another run has the same name.
        config: content of `config.yaml`; empty without that file.
    """

    folder: Path
    label: str
    colour: str
    style: str
    records: list[Record]
    config: dict[str, Any]

    def series(self, phase: str, key: str) -> dict[int, float]:
        """step -> value, in step order. The last record of a step wins; NaN stands for a value that was not finite."""
        values = {r["step"]: r[key] for r in self.records if r["phase"] == phase and key in r}
        return {step: math.nan if values[step] is None else values[step] for step in sorted(values)}

    def finite(self, phase: str, key: str) -> dict[int, float]:
        """The finite values of `series`."""
        return {step: value for step, value in self.series(phase, key).items() if math.isfinite(value)}

    def text(self, name: str) -> str:
        """Content of a file in the folder; empty if there is none."""
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs of a report.

    Raises:
        UserError: a folder holds no run or no train step yet.
    """
    names = [folder.resolve().name for folder in folders]
    runs: list[Run] = []
    for i, folder in enumerate(folders):
        records = read_metrics(folder)
        if not any(record["phase"] == "train" for record in records):
            raise UserError(f"{folder} has no train step yet; wait for its first one to end")
        label = names[i] if names.count(names[i]) == 1 else str(folder)
        turn, place = divmod(i, len(COLOURS))
        run = Run(folder, label, COLOURS[place], STYLES[turn % len(STYLES)], records, {})
        runs.append(replace(run, config=yaml.safe_load(run.text(CONFIG_FILE)) or {}))
    return runs
