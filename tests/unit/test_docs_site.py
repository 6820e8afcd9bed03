"""The reference of settings, made from docstrings. That the site builds without a warning is for `make docs`, in CI."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def extension() -> Any:
    sys.path.insert(0, str(DOCS))
    try:
        import sphinx_ext  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(DOCS))
    return sphinx_ext


def settings_of(extension: Any, section: type[Any]) -> list[tuple[type[Any], str]]:
    """Every setting below a section: the dataclass that it stands in, and its name."""
    found: list[tuple[type[Any], str]] = []
    for name, inner in extension.sections_of(section).items():
        found += [(section, name)] if inner is None else settings_of(extension, inner)
    return found


def test_every_setting_has_a_meaning(extension: Any) -> None:
    from megatron_aspo.config import RunConfig

    settings = settings_of(extension, RunConfig)
    assert len(settings) > 130
    missing = [f"{cls.__name__}.{name}" for cls, name in settings if not extension.documented_fields(cls)[1].get(name)]
    assert missing == []


def test_no_meaning_without_a_setting(extension: Any) -> None:
    from megatron_aspo.config import RunConfig

    classes = {cls for cls, _ in settings_of(extension, RunConfig)}
    for cls in classes:
        names = {field.name for field in dataclasses.fields(cls)}
        assert set(extension.documented_fields(cls)[1]) <= names, cls


def test_a_docstring_is_read(extension: Any) -> None:
    @dataclasses.dataclass
    class Section:
        """What it is.

        More.

        Attributes:
            a, b: two of them,
                in two lines.
            c: one.
        """

        a: int = 1
        b: bool = True
        c: str = ""

    summary, meaning = extension.documented_fields(Section)
    assert summary == "What it is.\n\nMore."
    assert meaning == {"a": "two of them, in two lines.", "b": "two of them, in two lines.", "c": "one."}
    lines = "\n".join(extension.settings_lines(Section, "x."))
    assert "* - ``x.b``\n     - ``true``\n     - two of them, in two lines." in lines
