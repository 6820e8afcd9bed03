"""Checks of single settings that the dataclasses share. Needs the standard library alone.

A check raises ValueError with a message that begins with the setting's name; `load` adds the section.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def near(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean ...?" with the most similar of `known`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3)
    # Of equally similar names (apso: sapo, aspo) the first letter decides.
    close.sort(key=lambda word: (-difflib.SequenceMatcher(None, word, name).ratio(), word[:1] != name[:1]))
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def require_known(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `known` or an import path."""
    require(
        value in known or is_import_path(value),
        f"{name}={value!r} is neither one of {', '.join(known)} nor an import path module:name{near(value, known)}",
    )


def is_import_path(value: str) -> bool:
    """Whether `value` has the form `package.module:name`."""
    module, colon, name = value.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))
