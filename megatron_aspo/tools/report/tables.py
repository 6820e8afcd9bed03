"""The tables of a report: results of the runs, and settings that differ."""

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from megatron_aspo.journal.progress import duration
from megatron_aspo.rollout.statistics import difference_interval, proportion_interval
from megatron_aspo.tools.report.runs import Run

METRICS = (  # name of the row, train metric, format
    ("Training reward", "reward/mean", ".3f"),
    ("Entropy, nats per token", "loss/entropy", ".3f"),
    ("KL to the reference", "loss/kl", ".4f"),
    ("Mean ratio, A > 0", "loss/ratio_pos", ".4f"),
    ("Mean ratio, A < 0", "loss/ratio_neg", ".4f"),
    ("Hard-clipped tokens, A > 0", "loss/clip_fraction_pos", ".2%"),
    ("Hard-clipped tokens, A < 0", "loss/clip_fraction_neg", ".2%"),
    ("4-grams repeated in a response", "rollout/repetition", ".1%"),
    ("Response length, tokens", "rollout/response_length", ".0f"),
    ("Gradient norm", "optimizer/grad_norm", ".3g"),
)

NONE = "–"

Rows = dict[str, list[str]]
"""Name of a row -> its cells, one per run."""


def result_rows(runs: Sequence[Run]) -> Rows:
    """Results of the runs; a change reads "before → after".

    Train metrics are means over the first and the last tenth of the steps. Accuracies have their 95 % interval.
    Durations are sums over the steps; a step repeated after a restart counts once.
    """
    rows: Rows = {}
    rows["Code"] = [", ".join(line[:18] for line in run.text("git.txt").splitlines()[:2]) for run in runs]
    rows["Held-out accuracy"] = [" → ".join(_accuracy(run, s) for s in _ends(run, "eval/accuracy")) for run in runs]
    if len(runs) > 1:
        rows[f"Difference from {runs[0].label}, last accuracy"] = ["", *(_difference(runs[0], run) for run in runs[1:])]
    greedy = "eval/greedy_accuracy"
    rows["Greedy held-out accuracy"] = [
        " → ".join(f"{run.finite('eval', greedy)[step]:.1%}" for step in _ends(run, greedy)) for run in runs
    ]
    for name, metric, spec in METRICS:
        rows[name] = [" → ".join(format(mean, spec) for mean in _tenths(run, metric)) for run in runs]
    rows["Train steps"] = [str(max(r["step"] for r in run.records if r["phase"] == "train")) for run in runs]
    rows["Time in train steps"] = [_time(run) for run in runs]
    return {name: [cell or NONE for cell in cells] for name, cells in rows.items() if any(cells)}


def config_differences(runs: Sequence[Run]) -> Rows:
    """The settings that differ. `name` and `output_dir` only say where a run lies."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in ("name", "output_dir"))
    rows = {key: [settings.get(key, NONE) for settings in flat] for key in keys}
    return {key: cells for key, cells in rows.items() if len(set(cells)) > 1}


def _ends(run: Run, metric: str) -> list[int]:
    """The first and the last evaluated step; one step alone."""
    steps = list(run.finite("eval", metric))
    return steps[:1] + steps[1:][-1:]


def _tenths(run: Run, metric: str) -> list[float]:
    """Means over the first and the last tenth of the steps; a single value alone."""
    values = list(run.finite("train", metric).values())
    tenth = math.ceil(len(values) / 10)
    return [statistics.fmean(part) for part in (values[:tenth], values[-tenth:]) if part][: len(values)]


def _time(run: Run) -> str:
    times = run.finite("train", "time/step").values()
    return f"{duration(sum(times))}, median {statistics.median(times):.2f} s" if times else ""


def _accuracy(run: Run, step: int) -> str:
    accuracy, count = run.series("eval", "eval/accuracy")[step], run.series("eval", "eval/count").get(step)
    if not count:
        return f"{accuracy:.1%} at step {step}"
    low, high = proportion_interval(accuracy, count)
    return f"{accuracy:.1%} [{low:.1%}, {high:.1%}] at step {step}"


def _difference(first: Run, second: Run) -> str:
    """Difference of the last accuracies in points, with its interval."""
    ends: list[tuple[float, float]] = []
    for run in (first, second):
        accuracy = run.finite("eval", "eval/accuracy")
        if not accuracy:
            return ""
        step = max(accuracy)
        ends.append((accuracy[step], run.series("eval", "eval/count").get(step) or 0))
    text = f"{100 * (ends[1][0] - ends[0][0]):+.1f} points"
    if all(count for _, count in ends):
        low, high = difference_interval(*ends)
        text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return text.replace("-", "−")


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return flat
