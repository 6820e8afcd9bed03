"""The reference of settings, made from docstrings. That the site builds without a warning is for `make docs`, in CI."""

from __future__ import annotations

import dataclasses
import os
import subprocess
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


def test_a_linked_file_is_a_page(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    (source / "docs").mkdir(parents=True)
    (source / "code").mkdir()
    (source / "conf.py").write_text("extensions = ['myst_parser', 'sphinx_ext']\nroot_doc = 'docs/index'\n")
    (source / "docs" / "index.md").write_text(
        "# Title\n\n[the `code`](../code/a.py), [again](../code/a.py), [b](../b)\n"
    )
    (source / "code" / "a.py").write_text("def less(a, b):\n    return a < b\n")
    (source / "b").write_text("<tag>\n")
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", str(source), str(site)],
        env={**os.environ, "PYTHONPATH": str(DOCS)},
        check=True,
    )
    index = (site / "docs" / "index.html").read_text()
    assert index.count('href="../files/code/a.py.html"') == 2
    assert index.count('href="../files/b.html"') == 1
    assert '<span class="o">&lt;</span>' in (site / "files" / "code" / "a.py.html").read_text()
    assert "&lt;tag&gt;" in (site / "files" / "b.html").read_text()
    assert not (site / "_downloads").exists()
