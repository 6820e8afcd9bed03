"""Data of the sample browser: the part of `samples.jsonl` that goes into the page, bounded in size."""

import itertools
import json
from collections import Counter
from typing import Any

from megatron_aspo.journal.log import Record, read_samples
from megatron_aspo.tools.report.runs import Run

PAGE_BYTES = 12 << 20
"""Limit for all samples in a page, shared equally by its runs."""

RESPONSES, TOKENS, PROMPT_CHARACTERS = 16, 2000, 20_000
"""Limits per group, per response and per prompt; the first ones are shown."""


def load_samples(run: Run, limit: int) -> dict[str, Any]:
    """The run's data in the page, with groups of at most `limit` bytes: of every n-th recorded step, counted from the
    last one, with the smallest n that fits; of the last step alone as many groups as fit."""
    sizes: Counter[int] = Counter()  # step -> bytes
    for line in read_samples(run.folder):  # read twice, because all lines may exceed the memory
        sizes[line["step"]] += _size(_compact(line))
    steps = sorted(sizes)
    strides = (steps[::-n] for n in itertools.count(1))
    chosen = next(part for part in strides if len(part) <= 1 or sum(sizes[step] for step in part) <= limit)
    groups: list[Record] = []
    room = limit
    for line in read_samples(run.folder):
        group = _compact(line)
        if line["step"] in chosen and _size(group) <= room:
            groups.append(group)
            room -= _size(group)
    objective = str(run.config.get("loss", {}).get("objective", ""))
    return {"label": run.label, "objective": objective, "steps": f"{len(chosen)} of {len(steps)}", "groups": groups}


def _size(group: Record) -> int:
    return len(json.dumps(group))


def _compact(line: Record) -> Record:
    """A line of the file in the page's form, without what exceeds its limits."""
    responses = [_compact_response(response) for response in line["responses"][:RESPONSES]]
    return {**line, "prompt": line["prompt"][:PROMPT_CHARACTERS], "responses": responses}


def _compact_response(response: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: response[name][:TOKENS] for name in ("ratio", "weight", "logprob", "entropy")}
    return {
        **{name: response[name] for name in ("score", "reward", "advantage")},
        "finish": response["finish_reason"],
        "versions": response.get("versions", []),
        "length": len(response["tokens"]),
        "tokens": response["tokens"][:TOKENS],
        **{name: [None if v is None else float(f"{v:.4g}") for v in values] for name, values in numbers.items()},
        **{name: [i for i in response[f"{name}_clipped"] if i < TOKENS] for name in ("hard", "soft")},
    }
