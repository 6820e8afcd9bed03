"""Contrasts and counts that no claim has: chosen after the runs were seen, for reading beside the verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from claims import Runs
from design import Key
from measures import MEASURES, Measure
from page import number
from paired import Numbers, interval

LOW, HIGH = 1.5e-4, 5e-4
FAILED = 0.01
"""pass@1 below which a run has failed, whenever its reward fell. Runs of A and B stay above 0.1."""

CONTRASTS = (  # metric, arm, other arm
    ("pass@1", "up", "grpo"),
    ("pass@1", "no_is_pos", "grpo"),
    ("pass@1", "no_is_pos", "aspo"),
    ("pass@1", "no_is_pos", "up"),
    ("pass@1", "aspo_unmasked", "grpo"),
    ("pass@1", "aspo_no_cap", "aspo"),
    ("entropy", "up", "grpo"),
    ("entropy", "no_is_pos", "grpo"),
    ("entropy", "aspo_unmasked", "grpo"),
)


def values(runs: Runs, measure: Measure, seeds: Sequence[int], block: str, arm: str, lr: float, k: int) -> Numbers:
    """The measure of the seeds' runs."""
    return np.array([measure(runs[Key(block, arm, lr, k, seed)]) for seed in seeds])


def cell(differences: Numbers) -> str:
    middle, low, high = map(float, interval(differences))
    return f"{number(middle)} [{number(low)}, {number(high)}]"


def planned_of(planned: Iterable[Key], runs: Runs, block: str) -> list[Key]:
    """The planned runs of a block; none if one is missing."""
    keys = sorted(key for key in planned if key.block == block)
    return keys if all(key in runs for key in keys) else []


def contrasts(planned: Iterable[Key], runs: Runs) -> str:
    """Return a table of paired differences in block A with their 95 % intervals, and one of the learning rates."""
    keys = planned_of(planned, runs, "A")
    if not keys:
        return "Not all runs of A are there."
    seeds = sorted({key.seed for key in keys})

    def of(metric: str, arm: str, lr: float) -> Numbers:
        return values(runs, MEASURES[metric], seeds, "A", arm, lr, 0)

    lines = ["| contrast | metric | lr 1.5e-4 | lr 5e-4 |", "|---" * 4 + "|"]
    for metric, arm, other in CONTRASTS:
        cells = [cell(of(metric, arm, lr) - of(metric, other, lr)) for lr in (LOW, HIGH)]
        lines.append(f"| {arm} less {other} | {metric} | {' | '.join(cells)} |")
    lines += ["", "| arm | pass@1 at lr 1.5e-4 less pass@1 at lr 5e-4 |", "|---|---|"]
    lines += [f"| {arm} | {cell(loss)} |" for arm, loss in losses(keys, runs).items()]
    return "\n".join(lines)


def losses(keys: Sequence[Key], runs: Runs) -> dict[str, Numbers]:
    """Return the pass@1 that each arm of A loses by the large learning rate, a value per seed."""
    seeds = sorted({key.seed for key in keys})
    of_arm = {
        arm: [values(runs, MEASURES["pass@1"], seeds, "A", arm, lr, 0) for lr in (LOW, HIGH)]
        for arm in dict.fromkeys(key.arm for key in keys)
    }
    return {arm: low - high for arm, (low, high) in of_arm.items()}


def findings(planned: Iterable[Key], runs: Runs) -> str:
    """Return sentences about all runs of a block, for docs/evidence.md."""
    planned = list(planned)
    lines: list[str] = []
    if keys := planned_of(planned, runs, "A"):
        seeds = sorted({key.seed for key in keys})
        lost = losses(keys, runs)
        means = [float(loss.mean()) for loss in lost.values()]
        scores = {arm: values(runs, MEASURES["pass@1"], seeds, "A", arm, HIGH, 0) for arm in lost}
        best = max(scores, key=lambda arm: scores[arm].mean())
        lines += [
            f"- At lr 5e-4 reward falls again: every arm of A loses {min(means):.2f} to {max(means):.2f} of pass@1.",
            f"- There {best} is the best of {len(scores)} arms: GRPO's pass@1 {cell(scores[best] - scores['grpo'])}.",
        ]
    if stale := [key for key in planned_of(planned, runs, "C") if key.k]:
        total = Counter(key.arm for key in stale)
        collapsed = Counter(key.arm for key in stale if MEASURES["collapse"](runs[key]))
        failed = Counter(key.arm for key in stale if MEASURES["pass@1"](runs[key]) < FAILED) - collapsed
        counts = [
            f"{arm} {n} of {total[arm]}" + (f" ({failed[arm]} more below pass@1 {FAILED})" if failed[arm] else "")
            for arm, n in collapsed.most_common()
        ]
        lines.append(f"- Stale runs that collapsed: {', '.join(counts)}, other arms none.")
    return "\n".join(lines) or "Nothing yet."
