"""Draw docs/loss_weights.png: the weight w of every objective against the importance ratio, for both signs of A.

    .venv/bin/python docs/make_loss_picture.py [output.png]

Curves are computed by the package's weight functions.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.loss.objectives import TokenInputs, find_objective

OUTPUT = Path(__file__).with_name("loss_weights.png")
SIZE_INCHES, DPI = (12.0, 14.0), 125

# Okabe and Ito's palette, distinct for colour-blind readers. The line widths differ too.
POSITIVE, NEGATIVE = "#0072B2", "#F0A020"
POSITIVE_INK, NEGATIVE_INK = "#0072B2", "#A66300"  # for text
INK, GREY, BAND, FRAME = "#24292f", "#6b7280", "#eef1f4", "#c4cad1"

MEAN_RATIO = 0.7  # mean ratio of the response for response_mean_is and gmpo; any value shows the shape
OLD = 0.1  # old probability of the token, for dppo
OF_RESPONSES = ("response_mean_is", "gmpo")
TOP = 3.6


class Panel(NamedTuple):
    """One objective with its configuration.

    `cell` is (row, column) of a 5 x 4 grid; `formulas` is printed below the title.
    """

    title: str
    formulas: str
    config: PolicyLossConfig
    cell: tuple[int, int]
    axis: str = "r"


PANELS = (
    Panel(
        "ASPO",
        "A > 0: the ratio flipped; beyond c held, not dropped",
        PolicyLossConfig("aspo", dual_clip=3.0),
        (0, 0),
    ),
    Panel("GRPO, dual clip", "A < 0: dropped beyond c", PolicyLossConfig("grpo", dual_clip=3.0), (0, 2)),
    Panel("DAPO", "grpo, clip_high 0.28, no c", PolicyLossConfig("grpo", clip_high=0.28, dual_clip=None), (0, 3)),
    Panel("no_is", "1 inside PPO's mask", PolicyLossConfig("no_is"), (1, 2)),
    Panel(
        "response_mean_is",
        f"A > 0: the response's mean r, here {MEAN_RATIO}",
        PolicyLossConfig("response_mean_is", dual_clip=3.0),
        (1, 3),
    ),
    Panel("GSPO", "s = the response's geometric mean", PolicyLossConfig("gspo"), (2, 0), "s"),
    Panel("CISPO", "clipped, never dropped; signs alike", PolicyLossConfig("cispo"), (2, 2)),
    Panel("SAPO", "a smooth gate, τ 1 and 1.05", PolicyLossConfig("sapo"), (2, 3)),
    Panel(
        "GMPO",
        f"the response's clipped geometric mean, {MEAN_RATIO}",
        PolicyLossConfig("gmpo", clip_low=0.4, clip_high=0.4),
        (2, 1),
    ),
    Panel("aspo_unmasked", "A > 0: no mask", PolicyLossConfig("aspo_unmasked", dual_clip=3.0), (3, 0)),
    Panel("no_is_pos", "A > 0: no_is; A < 0: GRPO", PolicyLossConfig("no_is_pos"), (3, 1)),
    Panel("up", "A > 0: always 1; A < 0: GRPO", PolicyLossConfig("up"), (3, 2)),
    Panel("tis", "r held at c = 2, never dropped", PolicyLossConfig("tis", dual_clip=2.0), (3, 3)),
    Panel(
        "DPPO",
        f"old probability {OLD}, moved by up to 0.15",
        PolicyLossConfig("dppo", clip_low=0.15, clip_high=0.15),
        (4, 0),
    ),
    Panel(
        "dppo_kl",
        f"old probability {OLD}, KL up to 0.05",
        PolicyLossConfig("dppo_kl", clip_low=0.05, clip_high=0.05),
        (4, 1),
    ),
)


def weights(config: PolicyLossConfig, ratio: Tensor, advantage: float) -> Tensor:
    """Return the weights w [n] of ratios [n], for tokens with the same advantage."""
    inputs = TokenInputs(
        logprobs=(OLD * ratio).log(),
        ratio=ratio,
        advantages=torch.full_like(ratio, advantage),
        clip_low=torch.full_like(ratio, config.clip_low),
        clip_high=torch.full_like(ratio, config.clip_high),
        sequence_ratio=torch.full_like(ratio, MEAN_RATIO) if config.objective in OF_RESPONSES else ratio,
    )
    objective, config = find_objective(config)
    return objective(inputs, config).weight


def draw() -> Figure:
    """Draw the figure. Each panel has lines labelled "A > 0" and "A < 0", which are NaN at their jumps."""
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": FRAME,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": FRAME,
        "ytick.color": FRAME,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI, facecolor="white")
        grid = figure.add_gridspec(5, 4, left=0.033, right=0.98, bottom=0.025, top=0.958, wspace=0.22, hspace=0.46)
        for panel in PANELS:
            row, column = panel.cell
            large = panel.title == "ASPO"
            cell = grid[0:2, 0:2] if large else grid[row, column]
            _draw_panel(figure.add_subplot(cell), panel, large)
        _draw_legend(figure.add_subplot(grid[4, 2]))
    return figure


def main(output: Path = OUTPUT) -> None:
    draw().savefig(output, metadata={"Software": None}, pil_kwargs={"optimize": True})


def _draw_panel(axes: Axes, panel: Panel, large: bool) -> None:
    config = panel.config
    low, high = 1 - config.clip_low, 1 + config.clip_high
    if config.objective == "gmpo":
        low, high = math.exp(-config.clip_low), math.exp(config.clip_high)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1 / 8, 8)
    axes.set_ylim(-0.12, TOP)
    axes.set_title(panel.title, loc="left", fontsize=15 if large else 11.5, fontweight="bold", pad=24 if large else 20)
    axes.text(0, 1.02, panel.formulas, transform=axes.transAxes, fontsize=11 if large else 9, color=GREY, va="bottom")

    if config.objective not in ("sapo", "dppo", "dppo_kl"):
        axes.axvspan(low, high, color=BAND, lw=0, zorder=0)
        for bound in (low, high):
            axes.axvline(bound, color=FRAME, lw=0.7, zorder=0.5)
    if isinstance(config.dual_clip, float):
        axes.axhline(config.dual_clip, color=GREY, lw=0.9, ls=(0, (4, 3)), zorder=1)
        axes.text(8, config.dual_clip + 0.07, "c", ha="right", va="bottom", color=GREY, fontstyle="italic")

    ratio = torch.logspace(-1, 1, 4001, dtype=torch.float64)
    # The wide line lies below the narrow one, so both stay visible where they coincide.
    for advantage, label, colour, width, order in (
        (-1.0, "A < 0", NEGATIVE, 5.0, 2),
        (1.0, "A > 0", POSITIVE, 2.0, 3),
    ):
        w = weights(config, ratio, advantage).numpy()
        r = ratio.numpy()
        jumps = np.flatnonzero(np.abs(np.diff(w)) > 0.3)
        axes.plot(
            np.insert(r, jumps + 1, np.nan),
            np.insert(w, jumps + 1, np.nan),
            color=colour,
            lw=width * (1.15 if large else 1),
            label=label,
            zorder=order,
            solid_capstyle="butt",
        )
        for jump in jumps:
            axes.plot([r[jump]] * 2, w[jump : jump + 2], color=colour, lw=0.35 * width, ls=":", zorder=1.5)

    ticks = {1 / 8: "⅛", 1 / 4: "¼", 1 / 2: "½", 1: "1", 2: "2", 4: "4", 8: "8"}
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=11 if large else 9.5)
    axes.set_yticks([0, 1, 2, 3], ["0", "1", "2", "3"], fontsize=11 if large else 9.5)
    axes.minorticks_off()
    # The axis names are at the ends, in line with the tick labels.
    axes.annotate(
        panel.axis, (1, 0), (12, -4), "axes fraction", "offset points", ha="center", va="top", fontstyle="italic"
    )
    axes.annotate("w", (0, 1), (-7, 0), "axes fraction", "offset points", ha="right", va="top", fontstyle="italic")
    if large:
        _annotate(axes, config)


def _annotate(axes: Axes, config: PolicyLossConfig) -> None:
    """Label the regions in ASPO's panel."""
    assert isinstance(config.dual_clip, float)
    above = TOP - 0.03
    axes.text(1 - config.clip_low - 0.02, above, "1 − ε_low", ha="right", va="top", color=GREY)
    axes.text(1 + config.clip_high + 0.03, above, "1 + ε_high", ha="left", va="top", color=GREY)
    for turn, name in ((1 / config.dual_clip, "1/c"), (config.dual_clip, "c")):
        axes.plot([turn, turn], [-0.12, config.dual_clip], color=FRAME, lw=0.7, zorder=0.5)
        axes.text(turn * 1.04, 0.1, name, ha="left", va="bottom", color=GREY, fontstyle="italic")
    for r, w, text, side, colour in (
        (0.132, 2.84, "held at c", "left", POSITIVE_INK),
        (0.355, 1.2, "1/r: lagging\ntokens pushed\nharder", "left", POSITIVE_INK),
        (1.28, 0.16, "dropped", "left", POSITIVE_INK),
        (7.7, 2.84, "held at c", "right", NEGATIVE_INK),
        (2.25, 1.85, "r", "left", NEGATIVE_INK),
        (0.74, 0.16, "dropped", "right", NEGATIVE_INK),
    ):
        axes.text(r, w, text, ha=side, va="center", color=colour)


def _draw_legend(axes: Axes) -> None:
    axes.axis("off")
    handles = [
        Line2D([], [], color=POSITIVE, lw=2),
        Line2D([], [], color=NEGATIVE, lw=5),
        Patch(facecolor=BAND, edgecolor=FRAME, lw=0.7),
        Line2D([], [], color=GREY, lw=0.9, ls=(0, (4, 3))),
    ]
    labels = ["A > 0", "A < 0", "clip range\n1 − ε_low … 1 + ε_high", "dual clip c"]
    axes.legend(handles, labels, loc="center left", frameon=False, fontsize=10.5, borderaxespad=0, labelspacing=0.9)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
