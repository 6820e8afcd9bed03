"""Analysis of the study: pack the metrics of its runs, compute power from its pilots, judge its claims.

    .venv/bin/python examples/study/analysis.py pack [--runs runs/study]
    .venv/bin/python examples/study/analysis.py power
    .venv/bin/python examples/study/analysis.py evidence [--docs docs]

`evidence` recounts docs/evidence.md and docs/lab/objectives.md from the packed metrics alone. The claims, with their
tests and planned seeds, are in claims.yaml, the runs' design in design.py; run.py makes the runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from claims import ALPHA, Claim, Judged, judge_all, load_claims
from design import ROOT
from figure import draw
from packed import RESULTS, Packed, load, pack
from page import (
    arms_table,
    demonstration,
    meaning,
    missing_lines,
    origin,
    planned_keys,
    status,
    tests_table,
    verdicts_table,
    with_parts,
)
from planning import power_table
from unplanned import contrasts, findings

from megatron_aspo.errors import UserError

PICTURE = "evidence.png"


def parts(judged: Sequence[Judged], packed: Packed, pictured: bool) -> dict[str, str]:
    """Return the generated parts of the pages by name."""
    picture = f"![Reward, entropy and repeated attempts by arm, with 95 % bands]({PICTURE})"
    missing = [*packed.refused, *missing_lines(judged)]
    planned = planned_keys(judged)
    return {
        "status": status(judged) + (f"\n\n{picture}" if pictured else ""),
        "verdicts": verdicts_table(judged),
        "meaning": meaning(judged),
        "unplanned": findings(planned, packed.runs),
        "demonstration": demonstration(packed.runs),
        "tests": tests_table(judged),
        "arms": arms_table(judged, packed.runs),
        "contrasts": contrasts(planned, packed.runs),
        "origin": origin(packed.runs),
        "missing": "\n".join(f"- {line}" for line in missing) or "Nothing.",
    }


def evidence(docs: Path, results: Path, claims: Sequence[Claim]) -> tuple[list[Judged], Packed]:
    """Recount the pages in `docs` from the packed runs."""
    packed = load(results)
    judged = judge_all(packed.runs, claims)
    generated = parts(judged, packed, draw(packed.runs, docs / PICTURE, planned_keys(judged)))
    for page in (docs / "evidence.md", docs / "lab" / "objectives.md"):
        page.write_text(with_parts(page.read_text(encoding="utf-8"), generated), encoding="utf-8")
    return judged, packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pack", "power", "evidence"))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the packed metrics")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    try:
        if arguments.command == "pack":
            new = pack(arguments.runs, arguments.results)
            size = sum(path.stat().st_size for path in arguments.results.rglob("*.xz"))
            print(f"{len(new)} new runs in {arguments.results}, which holds {size / 1e6:.1f} MB")
        elif arguments.command == "power":
            print(power_table(load(arguments.results).runs, load_claims(), ALPHA))
        else:
            judged, packed = evidence(arguments.docs, arguments.results, load_claims())
            print(*packed.refused, *missing_lines(judged), status(judged), sep="\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
