"""`make recipes`: rehearse every recipe that has a cluster, and write the table of docs/scale.md.

A result stays in build/recipes/NAME.json; it is made anew if the recipe changes, or if NAME is an argument. The
argument "table" writes the table of the results that there are.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from megatron_aspo.config.load import load_config
from megatron_aspo.tools.planning.gpus import GIB
from megatron_aspo.tools.planning.plan import Plan, make_plan
from megatron_aspo.tools.rehearsal.findings import find
from megatron_aspo.tools.rehearsal.memory import all_needs
from megatron_aspo.tools.rehearsal.run import check_parts, check_ready, rehearse
from megatron_aspo.tools.rehearsal.step import step_times

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build/recipes"
PAGE = ROOT / "docs/scale.md"
MARKERS = "<!-- make recipes -->\n", "<!-- end -->\n"

LENGTHS = (1.0, 1 / 3)
"""Lengths of samples, over the largest one."""

COLUMNS = {
    "rollout": ("engine start", "rollout"),
    "log-probs": ("old log-probs", "reference log-probs"),
    "update": ("first update", "update", "update after resume"),
    "refit": ("refit",),
    "save": ("checkpoint save",),
    "resume": ("build to resume", "checkpoint load"),
}
"""Column -> rehearsed phases, of which the largest counts."""


def recipes() -> list[Path]:
    return sorted(path for path in (ROOT / "examples").glob("*.yaml") if "\ncluster:" in path.read_text())


def rehearse_recipe(path: Path) -> dict[str, Any]:
    """Memory in GiB of the fullest rank by phase, simulated times, failed checks, and what it took.

    Rehearsed is the first rank of each kind of stage. `megatron-aspo plan` also lets rank 0 and a
    neighbour run together.
    """
    plan = make_plan(load_config(path))
    check_ready(plan)
    start = time.perf_counter()
    whole = check_parts(plan).findings
    traces = rehearse(plan)
    needs = all_needs(traces, plan)
    times = {f"{length:.2f}": step_times(traces, plan, length) for length in LENGTHS}
    return {
        "recipe": _fingerprint(path),
        "gpus": _gpus(plan),
        "of": plan.gpu.memory / GIB,
        "memory": {
            name: max(need.device for need in needs if need.phase in phases) / GIB for name, phases in COLUMNS.items()
        },
        "phases": {f"{need.role}, {need.phase}": round(need.device / GIB, 2) for need in needs},
        "host": max(need.host for need in needs) / GIB,
        "times": {
            length: {
                "seconds": each.seconds | {"step": each.step},
                "mfu": each.mfu,
                "bubble": each.bubble,
                "tokens/s/GPU": each.tokens_per_second_per_gpu,
            }
            for length, each in times.items()
        },
        "failed": [*whole, *find(traces, plan)],
        "ranks": [trace.rank for trace in traces],
        "minutes": (time.perf_counter() - start) / 60,
        "cpu seconds": sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]),
        "largest process, GiB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB,
    }


def _fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _gpus(plan: Plan) -> str:
    cluster = plan.config.cluster
    assert cluster is not None
    return f"{cluster.nodes} × {cluster.gpus_per_node} {plan.gpu.name.split('-')[0]}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown table of the results."""
    lines = [
        f"|recipe|GPUs|{'|'.join(COLUMNS)}|host|step, s|MFU, %|tokens/s/GPU|",
        "|---" * (len(COLUMNS) + 6) + "|",
    ]
    for name, result in results.items():
        memory = "|".join(f"{result['memory'][column]:.1f}" for column in COLUMNS)
        times = result["times"]["0.33"]
        ranges = (times["seconds"]["step"], [100 * share for share in times["mfu"]], times["tokens/s/GPU"])
        speed = "|".join(f"{low:.0f}-{high:.0f}" for low, high in ranges)
        lines.append(f"|`{name}`|{result['gpus']}|{memory}|{result['host']:.0f}|{speed}|")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    RESULTS.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for path in recipes():
        file = RESULTS / f"{path.stem}.json"
        stored = json.loads(file.read_text()) if file.is_file() else {}
        if names == ["table"]:
            if not stored:
                continue
        elif path.stem in names or stored.get("recipe") != _fingerprint(path):
            print(f"{path.stem} ...", file=sys.stderr, flush=True)
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, context) as apart:  # for its children's time and memory alone
                stored = apart.submit(rehearse_recipe, path).result()
            file.write_text(json.dumps(stored, indent=1))
        results[path.stem] = stored
        print(f"{path.stem}: {stored['minutes']:.1f} min; " + ("; ".join(stored["failed"]) or "all checks pass"))
    before, _, rest = PAGE.read_text().partition(MARKERS[0])
    PAGE.write_text(before + MARKERS[0] + table(results) + MARKERS[1] + rest.partition(MARKERS[1])[2])
    return 1 if any(result["failed"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
