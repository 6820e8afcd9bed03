"""Sphinx extension: formulas as MathML, references of settings and commands, pages for files of the repository."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import html
import importlib
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

from megatron_aspo.cli import build_parser

FILE_PAGES = "files/"
"""Folder of the site for pages that show the repository's files."""

_LINE = re.compile(r"    (\w+(?:, \w+)*): (.*)")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    app.add_directive("settings", Settings)
    app.add_directive("commands", Commands)
    app.connect("doctree-read", _link_to_file_pages, priority=400)  # before Sphinx collects downloads
    app.connect("html-collect-pages", _file_pages)
    return {"parallel_read_safe": False, "parallel_write_safe": True}


def _inline_math(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(str(tex2mathml(node.astext())))
    raise nodes.SkipNode


def _block_math(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


def _link_to_file_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Replace download links to the repository's text files by links to pages that show them."""
    shown = app.env.__dict__.setdefault("shown_files", dict[str, str]())
    for link in list(doctree.findall(addnodes.download_reference)):
        file, path = app.env.relfn2path(link["reftarget"], app.env.docname)
        try:
            shown[file] = Path(path).read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):  # Sphinx reports missing files; pictures stay downloads
            continue
        uri = app.builder.get_relative_uri(app.env.docname, FILE_PAGES + file)
        link.replace_self(nodes.reference("", "", *link.children, refuri=uri, internal=True))


def _file_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (name, context, template) of a page for each linked file."""
    highlighter = typing.cast("StandaloneHTMLBuilder", app.builder).highlighter
    for file, text in sorted(app.env.__dict__.get("shown_files", {}).items()):
        try:
            language = get_lexer_for_filename(file).aliases[0]
        except ClassNotFound:
            language = "text"
        title = html.escape(file)
        body = f"<h1>{title}</h1>\n{highlighter.highlight_block(text, language)}"
        yield FILE_PAGES + file, {"title": title, "body": body}, "page.html"


class Settings(SphinxDirective):
    """`.. settings:: module.Class`: tables of a dataclass's fields and, recursively, of fields that are dataclasses.

    Descriptions come from the docstrings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, name = self.arguments[0].rsplit(".", 1)
        lines = settings_lines(getattr(importlib.import_module(module), name), "")
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def settings_lines(settings: type[Any], prefix: str) -> list[str]:
    """Return the tables as lines of reStructuredText."""
    hints = typing.get_type_hints(settings)
    sections = sections_of(settings)
    summary, meaning = documented_fields(settings)
    lines = [summary, "", ".. list-table::", "   :header-rows: 1", "   :widths: 32 18 50", ""]
    lines += ["   * - setting", "     - default", "     - meaning"]
    for field in dataclasses.fields(settings):
        if sections[field.name] is not None:
            continue
        default = "" if _default(field) is None else f"``{_default(field)}``"
        lines += [f"   * - ``{prefix}{field.name}``", f"     - {default}"]
        lines += [f"     - {meaning.get(field.name, '')}{_choices(hints[field.name])}"]
    lines += [""]
    for name, inner in sections.items():
        if inner is not None:
            title = f"``{prefix}{name}``"
            lines += [
                "",
                title,
                ("-" if not prefix else "^") * len(title),
                "",
                *settings_lines(inner, f"{prefix}{name}."),
            ]
    return lines


def sections_of(settings: type[Any]) -> dict[str, type[Any] | None]:
    """Map each field to the dataclass that it holds, optional or not; to None for plain values and lists."""
    hints = typing.get_type_hints(settings)
    kinds = {
        name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,) for name, hint in hints.items()
    }
    sections: dict[str, type[Any] | None] = {}
    for field in dataclasses.fields(settings):
        inner = [kind for kind in kinds[field.name] if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
        sections[field.name] = inner[0] if inner else None
    return sections


def documented_fields(settings: type[Any]) -> tuple[str, dict[str, str]]:
    """Return a dataclass's docstring without attributes, and the description of each own or inherited field.

    Descriptions are attributes of the docstring, or string literals below the fields.
    """
    meaning: dict[str, str] = {}
    summary: list[str] = []
    for cls in reversed([c for c in settings.__mro__ if dataclasses.is_dataclass(c)]):
        summary, names = [], []
        for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
            if line == "Attributes:":
                names = [""]
            elif line and not line.startswith(" "):
                names = []
            if not names:
                summary.append(line)
            elif found := _LINE.fullmatch(line):
                names = found[1].split(", ")
                meaning |= dict.fromkeys(names, found[2])
            elif line.strip() and names != [""]:
                meaning |= {name: f"{meaning[name]} {line.strip()}" for name in names}
        meaning |= _field_docstrings(cls)
    return "\n".join(summary).strip(), meaning


def _field_docstrings(cls: type[Any]) -> dict[str, str]:
    """Return the string literals that follow fields in a class body, on one line each."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(following.value.value.split())
        for field, following in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(following.value.value, str)
    }


def _default(field: dataclasses.Field[Any]) -> str | None:
    """Return the default as written in YAML; None for a required field."""
    factory = field.default_factory
    value = factory() if factory is not dataclasses.MISSING else field.default
    if value is dataclasses.MISSING:
        return None
    return value if isinstance(value, str) and value else json.dumps(value)


def _choices(hint: Any) -> str:
    allowed = [
        str(a)
        for t in (hint, *typing.get_args(hint))
        if typing.get_origin(t) is typing.Literal
        for a in typing.get_args(t)
    ]
    return f" One of {', '.join(f'``{a}``' for a in allowed)}." if allowed else ""


class Commands(SphinxDirective):
    """`.. commands::`: the help of `megatron-aspo` and of each of its commands."""

    def run(self) -> list[nodes.Node]:
        parser = build_parser()
        (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        found: list[nodes.Node] = []
        for name, command in subparsers.choices.items():
            section = nodes.section(ids=[f"megatron-aspo-{name}"])
            text = command.format_help()
            section += [
                nodes.title("", "", nodes.literal("", f"megatron-aspo {name}")),
                nodes.literal_block(text, text, language="text"),
            ]
            found.append(section)
        return found
