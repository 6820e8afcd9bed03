"""The curves of a report: each panel as an SVG that takes its colours from the page."""

import hashlib
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_aspo.rollout.statistics import proportion_interval
from megatron_aspo.tools.report.panels import PANELS, Panel
from megatron_aspo.tools.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Mid-tones: readable on white and on near-black.
LINE_COLOURS = ("#3d85c6", "#e0813a", "#8b929c")

INK, LINES = "#010203", "#040506"
"""Placeholders for the page's own colours in an SVG; they occur nowhere else."""

SMOOTHED_FROM = 10
"""Points; shorter series are drawn as they are."""

STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LINES),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    **{"axes.grid": True, "axes.axisbelow": True, "svg.fonttype": "none"},
    "path.simplify_threshold": 1.0,  # pixel: the size of a page must not grow with the length of a run
}


def make_plots(runs: Sequence[Run]) -> dict[str, str]:
    """Title -> <svg> element of every panel with data. A comparison has one panel per metric, with a curve per run."""
    panels = PANELS if len(runs) == 1 else [one for panel in PANELS for one in panel.split()]
    return {
        panel.title: svg(panel, runs)
        for panel in panels
        if any(run.finite(panel.phase, metric) for run in runs for metric in panel.lines.values())
    }


def svg(panel: Panel, runs: Sequence[Run]) -> str:
    """One panel as an <svg> element in the colours of the page around it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The salt separates the ids of clip paths and markers of the plots on one page.
    salt = hashlib.sha256(panel.title.encode()).hexdigest()
    with rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(4.6, 2.75), layout="constrained")
        draw(figure.subplots(), panel, runs)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = "<svg" + file.getvalue().partition("<svg")[2]
    # HTML needs no namespaces, and a size in points would keep the plot from shrinking.
    text = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every plot, and never referred to
    return text.replace(INK, "currentColor").replace(LINES, "var(--lines)").strip()


def draw(axes: "Axes", panel: Panel, runs: Sequence[Run]) -> None:
    """Draw the panel. Colours stand for its metrics if there is one run, otherwise for the runs."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for run in runs:
        for colour, (label, metric) in zip(LINE_COLOURS, panel.lines.items(), strict=False):
            if run.finite(panel.phase, metric):
                several = {"color": run.colour, "ls": run.style}
                _draw_curve(axes, panel, run, metric, **several if len(runs) > 1 else {"color": colour, "label": label})
    axes.set_title(panel.title)
    axes.set_xlabel("warm-up step" if panel.phase == "warmup" else "step")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1) if panel.percent else "{x:g}")
    if len(axes.get_legend_handles_labels()[1]) > 1:
        # On the title's line at the right, where it covers no data.
        axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.97), ncols=3, handlelength=1.2, columnspacing=1.0)


def _draw_curve(axes: "Axes", panel: Panel, run: Run, metric: str, **look: Any) -> None:
    points = run.series(panel.phase, metric)
    steps, values = np.array(list(points)), np.array(list(points.values()))
    if panel.phase == "eval":
        errors = _error_bars(points, run.series("eval", "eval/count"))
        axes.errorbar(steps, values, errors, marker="o", ms=4, capsize=2.5, **look)
    elif len(values) < SMOOTHED_FROM:
        axes.plot(steps, values, marker="o", ms=3.5, **look)
    else:
        axes.plot(steps, values, color=look["color"], alpha=0.3, lw=0.8)
        axes.plot(steps, _smooth(values), lw=1.8, **look)


def _error_bars(accuracy: dict[int, float], count: dict[int, float]) -> npt.NDArray[np.float64]:
    """Lengths of the 95 % error bars below and above each accuracy, [2, steps]; 0 at a step without a count."""
    intervals = [proportion_interval(p, count[step]) if count.get(step) else (p, p) for step, p in accuracy.items()]
    return np.array([(p - low, high - p) for p, (low, high) in zip(accuracy.values(), intervals, strict=True)]).T


def _smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Moving average over a tenth of the run, with bell-shaped weights; values that are not finite are skipped."""
    window = np.hanning(2 * (len(values) // 20) + 3)[1:-1]
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), window, "same")
    counts = np.convolve(finite, window, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
