"""The tables of a report: what a run came to, how runs differ in results and in settings."""

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from megatron_aspo.progress import duration
from megatron_aspo.report.runs import Run, difference, finite, wilson

CHANGES = (  # rows: name, train metric, format
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

_NOT_COMPARED = ("name", "output_dir")
"""Settings that say where a run lies."""


def summary_rows(run: Run) -> list[tuple[str, str]]:
    """(name, text) per fact of one run; a change reads "before → after".

    Train metrics are means over the first and the last tenth of the steps, accuracies come with their
    95% Wilson interval, durations are sums over the steps that stand (those redone after a kill count once).
    """
    rows = _accuracy_rows(run)
    for name, key, spec in CHANGES:
        if values := finite(run.series("train", key)):
            before, after = (format(statistics.fmean(part), spec) for part in _ends(values))
            rows.append((name, f"{before} → {after}" if len(values) > 1 else after))
    rows += [(name, text) for name, text in _whole_run(run) if text != NONE]
    if missing := sum(value is None for r in run.records for value in r.values()):
        rows.append(("Values that were not finite", str(missing)))
    return rows


def comparison_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(name, a cell for every run) per fact; train metrics are means over the last tenth of a run's steps."""
    first = runs[0]
    rows = [
        ("Held-out accuracy, last", [_accuracy(run, last=True) for run in runs]),
        (f"Difference from {first.letter}", [NONE, *(_difference(first, run) for run in runs[1:])]),
        ("Held-out accuracy, best", [_accuracy(run, last=False) for run in runs]),
        ("Greedy held-out accuracy, last", [_last_greedy(run) for run in runs]),
    ]
    for name, key, spec in CHANGES:
        values = [finite(run.series("train", key)) for run in runs]
        rows.append((name, [format(statistics.fmean(_ends(v)[1]), spec) if v else NONE for v in values]))
    columns = [_whole_run(run) for run in runs]
    rows += [(row[0][0], [text for _, text in row]) for row in zip(*columns, strict=True)]
    return [(name, cells) for name, cells in rows if set(cells) != {NONE}]


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(setting, its value in every run) for settings that are not the same in all."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in _NOT_COMPARED)
    rows = [(key, [_setting(settings[key]) if key in settings else NONE for settings in flat]) for key in keys]
    return [(key, cells) for key, cells in rows if len(set(cells)) > 1]


def facts(run: Run) -> list[tuple[str, str]]:
    """What ran, and where: the code, the sections of the configuration that matter most, the machine."""
    found = {"Code": ", ".join(run.text("git.txt").splitlines()[:2])}
    for name, section in (("Model", "model"), ("Layout", "parallel"), ("Loss", "loss")):
        fields = {key: value for key, value in (run.config.get(section) or {}).items() if value not in (None, "")}
        found[name] = " · ".join(f"{key} {value}" for key, value in fields.items())
    machine = (line.partition(": ") for line in run.text("environment.txt").partition("\n\n")[0].splitlines())
    found["Machine"] = " · ".join(f"{k} {value}" for k, _, value in machine if k in ("ranks", "gpus", "cpus"))
    return [(name, text) for name, text in found.items() if text]


def _ends(values: list[float]) -> tuple[list[float], list[float]]:
    """The first and the last tenth."""
    tenth = math.ceil(len(values) / 10)
    return values[:tenth], values[-tenth:]


def _whole_run(run: Run) -> list[tuple[str, str]]:
    """Rows that have no before and after, always the same ones."""
    largest = finite(run.series("train", "optimizer/grad_norm_max"))
    times = finite(run.series("train", "time/step"))
    took = f"{duration(sum(times))}, median {statistics.median(times):.2f} s" if times else NONE
    return [
        ("Largest gradient norm", f"{max(largest):.3g}" if largest else NONE),
        ("Train steps", str(max(r["step"] for r in run.records if r["phase"] == "train"))),
        ("Time in train steps", took),
    ]


def _accuracies(run: Run) -> dict[int, float]:
    return {step: value for step, value in run.series("eval", "eval/accuracy").items() if math.isfinite(value)}


def _with_interval(run: Run, step: int) -> str:
    accuracy, count = _accuracies(run)[step], run.series("eval", "eval/count").get(step)
    if not count:
        return f"{accuracy:.1%}"
    low, high = wilson(accuracy, count)
    return f"{accuracy:.1%} [{low:.1%}, {high:.1%}]"


def _accuracy_rows(run: Run) -> list[tuple[str, str]]:
    accuracy = _accuracies(run)
    if not accuracy:
        return []
    first, last = min(accuracy), max(accuracy)
    if first == last:
        return [(f"Held-out accuracy, step {last}", _with_interval(run, last))]
    rows = [
        (f"Held-out accuracy, step {first} → {last}", f"{_with_interval(run, first)} → {_with_interval(run, last)}"),
        ("Best held-out accuracy", _accuracy(run, last=False)),
    ]
    greedy = run.series("eval", "eval/greedy_accuracy")
    if first in greedy and last in greedy:
        rows.append(("Greedy held-out accuracy", f"{greedy[first]:.1%} → {greedy[last]:.1%}"))
    return rows


def _accuracy(run: Run, last: bool) -> str:
    """The last or the best one, and its step."""
    accuracy = _accuracies(run)
    if not accuracy:
        return NONE
    step = max(accuracy) if last else max(accuracy, key=accuracy.__getitem__)
    return f"{_with_interval(run, step)} at step {step}"


def _last_greedy(run: Run) -> str:
    greedy = finite(run.series("eval", "eval/greedy_accuracy"))
    return f"{greedy[-1]:.1%}" if greedy else NONE


def _difference(one: Run, other: Run) -> str:
    """Of the last accuracies, in points."""
    ends: list[tuple[float, float]] = []
    for run in (one, other):
        if not (accuracy := _accuracies(run)):
            return NONE
        ends.append((accuracy[max(accuracy)], run.series("eval", "eval/count").get(max(accuracy)) or 0))
    text = f"{100 * (ends[1][0] - ends[0][0]):+.1f} points"
    if all(count for _, count in ends):
        low, high = difference(*ends)
        text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return text.replace("-", "−")


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
