"""Draw docs/performance.png from the output of `benchmarks/loss_head.py --json docs/performance.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLOURS = {
    "fused sweep": "#0072B2",
    "logits path": "#56B4E9",
    "Megatron-Core's cross entropy": "#E69F00",
    "gather, then log_softmax": "#999999",
}


def draw(figures: list[dict[str, Any]], path: Path) -> None:
    # Cases that differ only in T: H = 2,048, V = 76,032, two ranks.
    cases = sorted((c for c in figures if c["case"][1:] == [2048, 76032, 2]), key=lambda c: c["case"][0])
    tokens = [c["case"][0] for c in cases]
    figure, (memory, times) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    width = 0.2
    for i, (name, colour) in enumerate(COLOURS.items()):
        megabytes = [c["ways"][name]["peak_bytes"] / 1e6 for c in cases]
        memory.plot(tokens, megabytes, "o-", color=colour, label=name, lw=2)
        memory.annotate(f"{megabytes[-1]:,.0f}", (tokens[-1], megabytes[-1]), (6, -3), textcoords="offset points")
        ratios = [c["ways"][name]["ratio"] for c in cases]
        bars = times.bar([x + (i - 1.5) * width for x in range(len(cases))], ratios, width, color=colour)
        times.bar_label(bars, fmt="%.2f", fontsize=8)
    memory.set(title="Peak memory over inputs, MB", xlabel="tokens", xscale="log", yscale="log")
    memory.set_xticks(tokens, [f"{t:,}" for t in tokens])
    memory.minorticks_off()
    memory.legend(frameon=False, fontsize=8)
    memory.margins(x=0.12)
    times.axhline(1, color="black", lw=1, ls=":")
    times.set(title="Time, in units of the three GEMMs alone", xlabel="tokens")
    times.set_xticks(range(len(cases)), [f"{t:,}" for t in tokens])
    for axes in (memory, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads((HERE / "performance.json").read_text()), HERE / "performance.png")
