"""The metrics that docs/metrics.md lists, read from its tables."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
PREFIXES = ("loss", "mismatch", "optimizer", "reward", "rollout", "data", "time", "eval")


def catalogue() -> list[str]:
    """Names in the first cells of the catalogue's tables, duplicates included.

    A first cell holds whole names, and suffixes such as `_pos` that extend the whole name before them.
    """
    _, *sections = PAGE.read_text(encoding="utf-8").partition("\n## Catalogue\n")[2].split("\n### ")
    names: list[str] = []
    for row in re.findall(r"^\|([^|]+)\|", "\n".join(sections), re.MULTILINE):
        whole = ""
        for name in re.findall(r"`([^`]+)`", row):
            whole = whole if name.startswith("_") else name
            names.append(whole + name if name.startswith("_") else name)
    return names


def mentioned(text: str) -> set[str]:
    """Every metric named in a text, in code or in backticks."""
    return set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(PREFIXES)})/[a-z0-9_]+(?![\w/.*-])", text))
