"""The metrics that docs/operations.md names: read from its tables."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
PREFIXES = ("loss", "mismatch", "optimizer", "reward", "rollout", "data", "time", "eval")


def catalogue() -> list[str]:
    """Every metric that a table of the catalogue has a row for, as often as it is there.

    A row's first cell holds whole names, and suffixes such as `_pos` of the whole name before them.
    """
    part = PAGE.read_text(encoding="utf-8").split("\n## What each metric means\n")[1].split("\n## ")[0]
    _, *sections = part.split("\n### ")  # before them are the words of the progress line
    names: list[str] = []
    for row in re.findall(r"^\|([^|]+)\|", "\n".join(sections), re.MULTILINE):
        whole = ""
        for name in re.findall(r"`([^`]+)`", row):
            whole = whole if name.startswith("_") else name
            names.append(whole + name if name.startswith("_") else name)
    return names


def mentioned(text: str) -> set[str]:
    """Every metric that a text names, in code or in backticks."""
    return set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(PREFIXES)})/[a-z0-9_]+(?![\w/.*-])", text))
