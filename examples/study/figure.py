"""The figure of docs/evidence.md: curves by arm with 95 % bands that exclude the variation between seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from design import Key
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from measures import MEASURES, filled
from packed import Metrics
from paired import Numbers, interval

NAMES = {
    "grpo": "GRPO",
    "aspo": "ASPO",
    "up": "UP",
    "no_is": "no IS",
    "tis": "TIS",
    "inert": "inert (anchored at the trainer)",
}
COLOURS = {  # Okabe and Ito's palette, distinct for colour-blind readers
    "aspo": "#D55E00",
    "grpo": "#0072B2",
    "up": "#009E73",
    "no_is": "#CC79A7",
    "tis": "#E69F00",
    "inert": "#000000",
}
METRICS = {"Reward of the samples": "reward/mean", "Entropy, nats a token": "loss/entropy"}
REPEATS = "Share of retries that repeat an attempt"
COLUMNS = (*METRICS, REPEATS)
SYNCHRONOUS, ASYNCHRONOUS = ("grpo", "aspo", "up", "no_is"), ("inert", "tis", "no_is", "grpo", "aspo", "up")
ROWS = (  # title, block, arms, staleness
    ("Fresh rollouts", "A", SYNCHRONOUS, 0),
    ("Rollouts 4 steps old", "C", ASYNCHRONOUS, 4),
)
SPANS = 30
"""Most points of a curve: each is a mean over a thirtieth of the steps. Shorter runs have a point per step."""

CURVES = "Curves"
"""Name of the text in the picture's file that holds the digest of what it shows."""

Runs = Mapping[Key, Metrics]
Band = tuple[Numbers, Numbers, Numbers]


@dataclass(frozen=True)
class Row:
    """A row of panels: runs by arm and seed, whose planned ones are all there."""

    title: str
    of_arm: Mapping[str, Mapping[int, Metrics]]
    seeds: Sequence[int]

    def curves(self, column: str) -> dict[str, Numbers]:
        """Curves [seeds, points] by arm."""
        return {arm: np.array([curve(runs[s], column) for s in self.seeds]) for arm, runs in self.of_arm.items()}

    def bands(self, column: str) -> dict[str, Band]:
        """Mean, low and high [points] by arm."""
        fell = [arm for arm, runs in self.of_arm.items() if any(map(MEASURES["collapse"], runs.values()))]
        return bands(self.curves(column), fell)


def curve(run: Metrics, title: str) -> Numbers:
    """Return the metric's means over `SPANS` equal spans of the run's steps."""
    if title == REPEATS:
        repeats, retries = (spans(run.train[f"rollout/{name}"]) for name in ("repeats", "retries"))
        return repeats / np.maximum(retries, 1e-9)
    return spans(run.train[METRICS[title]])


def spans(values: Numbers) -> Numbers:
    return np.array([part.mean() for part in np.array_split(filled(values), min(SPANS, len(values)))])


def bands(curves: Mapping[str, Numbers], collapsed: Collection[str] = ()) -> dict[str, Band]:
    """Return mean, low and high by arm of curves [seeds, points].

    The bands compare arms, so that the mean of all seeds replaces each seed's mean over the arms (Cousineau, Tutor.
    Quant. Methods Psychol. 1, 2005), with Morey's correction of the variance (ibid. 4, 2008). Arms with collapsed runs
    have plain t bands and are in no seed's mean: the steps at which runs collapse would widen the other arms' bands.
    """
    compared = [curve for arm, curve in curves.items() if arm not in collapsed]
    every = np.stack(compared or list(curves.values()))
    shift = every.mean((0, 1)) - every.mean(0)
    widening = np.sqrt(len(every) / (len(every) - 1)) if len(every) > 1 else 1.0
    found: dict[str, Band] = {}
    for arm, of_seeds in curves.items():
        mean, low, high = interval((of_seeds if arm in collapsed else of_seeds + shift).T)
        wider = 1.0 if arm in collapsed else widening
        found[arm] = mean, mean - wider * (mean - low), mean + wider * (high - mean)
    return found


def complete_rows(runs: Runs, planned: Iterable[Key]) -> list[Row]:
    """Return the rows whose planned runs are all there."""
    keys, rows = sorted(planned), list[Row]()
    for (title, block, arms, k), lr in product(ROWS, sorted({key.lr for key in keys})):
        of_row = [key for key in keys if (key.block, key.k, key.lr) == (block, k, lr) and key.arm in arms]
        if of_row and all(key in runs for key in of_row):
            seeds = sorted({key.seed for key in of_row})
            of_arm = {arm: {key.seed: runs[key] for key in of_row if key.arm == arm} for arm in arms}
            of_arm = {arm: of_seed for arm, of_seed in of_arm.items() if of_seed}
            rows.append(Row(f"{title},\nlr {lr:g}, {len(seeds)} seeds", of_arm, seeds))
    return rows


def digest(rows: Sequence[Row]) -> str:
    """Return a digest of the titles and of all bands, by which a test knows a picture of other runs."""
    shown = [
        (r.title, column, arm, np.stack(band).round(6).tolist())
        for r in rows
        for column in COLUMNS
        for arm, band in r.bands(column).items()
    ]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def draw(runs: Runs, path: Path, planned: Iterable[Key]) -> bool:
    """Write the figure of the complete rows; False, and no file, if there are none."""
    rows = complete_rows(runs, planned)
    if not rows:
        path.unlink(missing_ok=True)
        return False
    figure, axes = plt.subplots(len(rows), 3, figsize=(13, 2.9 * len(rows)), layout="constrained", squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, column in zip(line, COLUMNS, strict=True):
            panel(axis, row, column)
        line[0].set_ylabel(row.title, fontsize=9)
    for axis, column in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(column, fontsize=10)
    labels: dict[str, Artist] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=80, metadata={"Software": None, CURVES: digest(rows)})
    plt.close(figure)
    return True


def panel(axis: Axes, row: Row, column: str) -> None:
    steps = next(iter(next(iter(row.of_arm.values())).values())).steps
    for arm, (mean, low, high) in row.bands(column).items():
        x = (np.arange(len(mean)) + 0.5) / len(mean) * steps
        axis.plot(x, mean, color=COLOURS[arm], lw=1.6, label=NAMES[arm])
        axis.fill_between(x, low, high, color=COLOURS[arm], alpha=0.15, lw=0)
    axis.set_xlabel("step", fontsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
