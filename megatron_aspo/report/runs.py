"""The runs of a report, read from their folders, and what is computed from their records."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_aspo.errors import UserError
from megatron_aspo.run_folder import CONFIG_FILE
from megatron_aspo.run_log import Record, read_metrics

Z95 = 1.959964
"""Standard errors on either side of a mean that make an interval of 95%."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Of the runs: those of Okabe and Ito's palette that read on white and on near-black. Every common kind of colour
vision tells them apart."""

DASHES = ("-", "--", ":", "-.")
"""Further runs have the same colours with other dashes."""


@dataclass(frozen=True)
class Run:
    """A folder, what stands in it, and how the run is told from the others everywhere in the report.

    Attributes:
        letter: A, B, C, ...: the direct label of its curves.
        label: the folder's name, or its path where two have the same name.
        config: `config.yaml`; empty if there is none.
    """

    folder: Path
    letter: str
    label: str
    colour: str
    dashes: str
    records: list[Record]
    config: dict[str, Any]

    def series(self, phase: str, key: str) -> dict[int, float]:
        return series(self.records, phase, key)

    def text(self, name: str) -> str:
        """A file of the folder, empty if there is none."""
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises UserError for what is no run, has no step yet, or cannot be compared."""
    resolved = [folder.resolve() for folder in folders]
    names = [folder.name for folder in resolved]
    runs: list[Run] = []
    for i, folder in enumerate(folders):
        if resolved[i] in resolved[:i]:
            raise UserError(f"{folder} is given twice; name every run once")
        records = read_metrics(folder)
        if not any(record["phase"] == "train" for record in records):
            raise UserError(f"{folder} has no train step yet; wait for its first one to end")
        label = names[i] if names.count(names[i]) == 1 else str(folder)
        colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        runs.append(Run(folder, letter(i), label, colour, dashes, records, _read_config(folder)))
    if not set.intersection(*(_metrics(run) for run in runs)):
        listed = " and ".join(str(folder) for folder in folders)
        raise UserError(f"{listed} have no metric in common, so there is nothing to compare; report them one by one")
    return runs


def letter(index: int) -> str:
    """A to Z, AA to AZ, ..."""
    head, last = divmod(index, 26)
    return (letter(head - 1) if head else "") + chr(ord("A") + last)


def series(records: Sequence[Record], phase: str, key: str) -> dict[int, float]:
    """step → value, in step order. The last record of a step wins; NaN where the value was not finite."""
    found = {r["step"]: r[key] for r in records if r["phase"] == phase and key in r}
    return {step: math.nan if found[step] is None else found[step] for step in sorted(found)}


def finite(values: dict[int, float]) -> list[float]:
    return [value for value in values.values() if math.isfinite(value)]


def wilson(accuracy: float, count: float) -> tuple[float, float]:
    """95% interval of a proportion (Wilson, 1927): within [0, 1], and of some width even at 0 and 1."""
    z = Z95
    centre = (accuracy + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(accuracy * (1 - accuracy) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def difference(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """95% interval of `other` - `one`, each (accuracy, count), from independent samples (Newcombe, Stat. Med. 17, 1998,
    method 10: from the two Wilson intervals)."""
    (p, n), (q, m) = other, one
    (low_p, high_p), (low_q, high_q) = wilson(p, n), wilson(q, m)
    return (p - q - math.hypot(p - low_p, high_q - q), p - q + math.hypot(high_p - p, q - low_q))


def _metrics(run: Run) -> set[tuple[str, str]]:
    common = ("step", "phase", "time")
    return {(record["phase"], key) for record in run.records for key in record if key not in common}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged; delete it, and the report is made without it") from None
    return found if isinstance(found, dict) else {}
