"""The line that a run prints for every step."""

from __future__ import annotations

from collections.abc import Mapping

SHOWN = (
    ("reward", "reward/mean", ".3f"),
    ("accuracy", "eval/accuracy", ".3f"),
    ("entropy", "loss/entropy", ".3f"),
    ("r+", "loss/ratio_pos", ".3f"),
    ("r-", "loss/ratio_neg", ".3f"),
    ("clip+", "loss/clip_fraction_pos", ".2%"),
    ("clip-", "loss/clip_fraction_neg", ".2%"),
    ("grad", "optimizer/grad_norm", ".3g"),
    ("nll", "loss/nll", ".3f"),
    ("length", "rollout/response_length", ".0f"),
    ("tok/s", "rollout/tokens_per_second", ",.0f"),
    ("s/step", "time/step", ".2f"),
)
"""Label, metric and format, in the order of the line."""


def progress_line(phase: str, step: int, total: int, values: Mapping[str, float]) -> str:
    """Format step `step` of `total`, with the time left at this step's pace if its time is known."""
    shown = [f"{label} {values[name]:{spec}}" for label, name, spec in SHOWN if name in values]
    if "time/step" in values:
        shown.append(f"eta {duration((total - step) * values['time/step'])}")
    return "  ".join([f"{phase} {step}/{total}", *shown])


def duration(seconds: float) -> str:
    """Seconds for a reader: "42 s", "3 min 05 s", "1 h 20 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
