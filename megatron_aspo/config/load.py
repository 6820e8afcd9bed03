"""Configuration from a YAML file and overrides. Imports neither torch nor Megatron."""

from __future__ import annotations

import json
import os
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from megatron_aspo.config.checks import check_together
from megatron_aspo.config.rules import near
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import UserError

_EXPECTED = {
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping",
    "dataclass_type": "should be a section with settings of its own",
}
"""pydantic's types of errors whose messages name JSON's types."""

_REMOVED = {"fp8.emulate": "FP8 needs a GPU; examples/study/fp8.py measures its rounding without one"}
"""Settings of older versions, and why they are no more."""

_LABEL = re.compile(r"\[key\]|float|literal\[.*\]")
"""Parts of an error's location that are no settings: keys of mappings, members of unions."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `a.b=c` overrides in order; UserError for the first mistake in them."""
    from omegaconf import OmegaConf  # imported here so that `megatron-aspo --help` stays fast
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not os.path.isfile(path):  # unlike Path.is_file, it returns False for a name that is too long
        raise UserError(f"no configuration file at {path}; see examples/ for ones that run")
    for override in overrides:
        if not re.match(r"[^=\s]+=", override):  # OmegaConf would set null
            raise UserError(f"override {override!r} is not of the form section.field=value")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = json.dumps(OmegaConf.to_container(merged, resolve=True))
    except (YAMLError, OmegaConfBaseException, OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}; fix the YAML or the override") from None
    try:
        config = TypeAdapter(RunConfig).validate_json(values)
    except ValidationError as error:
        raise UserError(_first_error(error)) from None
    check_together(config)
    return config


def _first_error(error: ValidationError) -> str:
    """Return the first error in one line. Unknown settings come before missing ones, which may be misspelled."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda e: e["type"] != "unexpected_keyword_argument")
    parts = [str(part) for part in first["loc"] if not _LABEL.fullmatch(str(part))]
    path, kind = ".".join(parts), first["type"]
    if kind == "unexpected_keyword_argument":
        if path in _REMOVED:
            return f"{path} was removed: {_REMOVED[path]}; remove the line"
        known = [f.name for f in fields(_section(parts[:-1]))]
        prefix = path.removesuffix(parts[-1])
        return f"unknown setting {path}{near(parts[-1], known, prefix) or '; known here: ' + ', '.join(known)}"
    if kind == "missing":
        return f"{path} is missing; add a line '{parts[-1]}: {'my-run' if path == 'name' else '...'}'"
    context = first.get("ctx", {})
    if kind == "value_error":  # of a section's __post_init__, which begins with the field's name
        return f"{path}.{context['error']}" if path else str(context["error"])
    message = _EXPECTED.get(kind, first["msg"].removeprefix("Input "))
    choices = re.findall(r"'([^']*)'", context.get("expected", ""))
    return f"{path}={_short(repr(first['input']))} {message}{near(str(first['input']), choices)}"


def _section(path: Sequence[str]) -> Any:
    """Return the dataclass of the section at `path`, in which a number is an index of a list."""
    section: Any = RunConfig
    for name in path:
        if not name.isdigit():
            hint = typing.get_type_hints(section)[name]
            section = next(kind for kind in (hint, *typing.get_args(hint)) if is_dataclass(kind))
    return section


def changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Yield the settings of the dataclass `now` that differ from `before`, read from YAML: "lr=2e-06 (was 1e-06)".

    A field that `before` lacks belongs to a newer version of the package and is no change.
    """
    prefix = f"{path}." if path else ""
    if is_dataclass(now) and isinstance(before, dict):
        values = cast("dict[str, Any]", before)
        for f in fields(now):
            if f.name in values:
                yield from changes(values[f.name], getattr(now, f.name), prefix + f.name)
        return
    items = cast("list[Any]", before) if isinstance(before, list) else []
    sections = list(cast("tuple[Any, ...]", now)) if isinstance(now, tuple) else []
    if items and len(items) == len(sections) and is_dataclass(sections[0]):
        for i, item in enumerate(items):
            yield from changes(item, sections[i], f"{prefix}{i}")
    elif to_jsonable_python(now) != to_jsonable_python(before):
        yield f"{path}={_plain(now)} (was {_plain(before)})"


def _plain(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[^\s,()]+", value):
        return _short(value)
    return _short(json.dumps(to_jsonable_python(value), ensure_ascii=False))


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
