"""What one sees while a run trains: a live panel in a terminal, one line per step in a log file."""

import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

# (label in the panel, label in a log line, key, format)
SHOWN = (
    ("reward", "reward", "reward/mean", ".3f"),
    ("held-out accuracy", "accuracy", "eval/accuracy", ".3f"),
    ("entropy", "entropy", "loss/entropy", ".3f"),
    ("ratio A>0", "r+", "loss/ratio_pos", ".3f"),
    ("ratio A<0", "r-", "loss/ratio_neg", ".3f"),
    ("clipped A>0", "clip+", "loss/clip_fraction_pos", ".2%"),
    ("clipped A<0", "clip-", "loss/clip_fraction_neg", ".2%"),
    ("grad norm", "grad", "optimizer/grad_norm", ".3g"),
    ("warm-up loss", "nll", "loss/nll", ".3f"),
    ("response length", "length", "rollout/response_length", ".0f"),
    ("tokens/s", "tok/s", "rollout/tokens_per_second", ",.0f"),
    ("s/step", "s/step", "time/step", ".2f"),
)


class Progress:
    """Context manager for rank 0. In a terminal the panel keeps the latest value of each metric.

    console: where to write; by default stdout.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._phase = ""
        self._latest: dict[str, float] = {}
        self._marks: deque[tuple[int, float]] = deque(maxlen=20)  # (step, when) of this phase

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, phase: str, step: int, total: int, values: dict[str, float]) -> None:
        """Show `values` of step `step` of `total`. phase: "warmup", "train" or "eval"."""
        if phase != "eval":  # an eval belongs to the train step it follows
            if phase != self._phase:
                self._marks.clear()
            self._phase = phase
            self._marks.append((step, time.monotonic()))
        self._latest.update(values)
        eta = self._eta(total - step)
        if self._live is not None:
            self._live.update(_panel(self._phase, step, total, eta, self._latest), refresh=True)
            return
        shown = (f"{short} {text}" for _, short, text in _shown(values))
        # Not rich's print: that one wraps a log file's lines at 80 columns.
        print(f"{phase} {step}/{total}", *shown, f"eta {eta}", sep="  ", file=self._console.file, flush=True)

    def say(self, message: str) -> None:
        """Print a line above the panel."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _eta(self, steps_left: int) -> str:
        """Wall time left at the pace of the last steps seen, evals and checkpoints included."""
        if len(self._marks) < 2:
            return "?"
        (first, start), (last, end) = self._marks[0], self._marks[-1]
        return duration(steps_left * (end - start) / max(last - first, 1))


def duration(seconds: float) -> str:
    """As a person says it: "42 s", "3 min 05 s", "1 h 20 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _shown(values: dict[str, float]) -> list[tuple[str, str, str]]:
    """(long label, short label, formatted value) of the metrics that are there."""
    return [(label, short, format(values[key], spec)) for label, short, key, spec in SHOWN if key in values]


def _panel(phase: str, step: int, total: int, eta: str, values: dict[str, float]) -> Group:
    bar = Table.grid(padding=(0, 2))
    done = ProgressBar(total=total, completed=step, width=40)
    bar.add_row(f"[bold]{phase}", done, f"{step}/{total}", f"[dim]eta {eta}")
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(min_width=12)
        table.add_column(min_width=8, justify="right")
    cells = [cell for label, _, text in _shown(values) for cell in (f"[dim]{label}", text)]
    for start in range(0, len(cells), 6):
        table.add_row(*cells[start : start + 6])
    return Group(bar, table)
