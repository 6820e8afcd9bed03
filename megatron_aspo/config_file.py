"""A configuration from a YAML file and overrides; imports neither torch nor Megatron.

Every type is checked, an unknown key is refused with the nearest name, and the sections are checked against each other.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_aspo.config import RunConfig
from megatron_aspo.config_checks import check_together
from megatron_aspo.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `a.b=c` overrides in order, validate.

    Raises:
        UserError: a missing or unreadable file, an unknown key, a value of the wrong type or out of range,
            or fields that contradict each other.
    """
    from omegaconf import OmegaConf  # imported here so that the loss library needs torch alone
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not os.path.isfile(path):  # unlike Path's, it takes a name that is too long for one that is not there
        raise UserError(f"no configuration file at {path}; see examples/ for ones that run")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override {override!r} is not of the form section.field=value")
    try:
        loaded = OmegaConf.load(path)
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}; fix the YAML or the override") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a mapping of sections; see examples/ for ones that run")
    config = _from_mapping(RunConfig, typing.cast("Mapping[str, Any]", values), "")
    config = _fill_dependent(config)
    check_together(config)
    return config


def changes(before: Mapping[str, Any], settings: Any, prefix: str = "") -> Iterator[str]:
    """What a dataclass of settings has otherwise than an earlier one, which YAML holds: "lr=2e-06 (was 1e-06)". A field
    that `before` lacks is one that an older version did not know, and no change."""
    for f in fields(settings):
        if f.name not in before:
            continue
        path, now, was = f"{prefix}{f.name}", getattr(settings, f.name), before[f.name]
        parts = _parts(now, was)
        if parts is not None:
            for name, one, other in parts:
                yield from changes(other, one, f"{path}.{name}")
        elif _as_json(now) != _as_json(was):
            yield f"{path}={_shown(now)} (was {_shown(was)})"


def _parts(now: Any, was: Any) -> list[tuple[str, Any, Any]] | None:
    """The sections of a value, each with what it was: itself, or those of a list of equal length. None for others."""
    if is_dataclass(now) and isinstance(was, dict):
        return [("", now, was)]
    if isinstance(now, tuple) and isinstance(was, list):
        ours, theirs = typing.cast("tuple[Any, ...]", now), typing.cast("list[Any]", was)
        pairs = list(zip(ours, theirs, strict=False))
        if len(ours) == len(theirs) and all(is_dataclass(one) and isinstance(other, dict) for one, other in pairs):
            return [(f"{i}.", *pair) for i, pair in enumerate(pairs)]
    return None


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """A section as a mapping; what YAML knows besides JSON's types, such as a date, is no setting's."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _shown(value: Any) -> str:
    """On one line, and not too long a one."""
    text = value if isinstance(value, str) and re.fullmatch(r"[^\s,()]+", value) else _as_json(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _fill_dependent(config: RunConfig) -> RunConfig:
    if config.loss.aggregation == "seq-mean-token-sum-norm" and config.loss.norm_length is None:
        return replace(config, loss=replace(config.loss, norm_length=config.rollout.max_response_tokens))
    return config


def _from_mapping(cls: type[Any], values: Mapping[str, Any], prefix: str) -> Any:
    """Build the dataclass `cls` from plain containers; `prefix` is the dotted path of errors."""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(known)}"
            raise UserError(f"unknown setting {prefix}{key}{hint}")
    arguments = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()}
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in arguments:
            example = "my-run" if f.name == "name" else "..."
            raise UserError(f"{prefix}{f.name} is missing; add a line '{f.name}: {example}'")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"{prefix.rstrip('.') + ': ' if prefix else ''}{error}") from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as an instance of the annotation `hint`, or UserError. An int serves where a float is asked."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{path}={value!r} should be a section with fields of its own")
        return _from_mapping(typing.cast("type[Any]", hint), typing.cast("Mapping[str, Any]", value), f"{path}.")
    if origin in (types.UnionType, typing.Union):  # the only unions here are `X | None`
        return None if value is None else _convert(arguments[0], value, path)
    if origin is Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
            hint_text = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{path}={value!r} is not one of {', '.join(map(str, arguments))}{hint_text}")
        return value
    if origin is tuple:
        items = typing.cast("list[Any]", value) if isinstance(value, list) else None
        if is_dataclass(arguments[0]):
            if items is None:
                raise UserError(f"{path}={value!r} should be a list of sections")
            return tuple(_convert(arguments[0], item, f"{path}.{i}") for i, item in enumerate(items))
        if items is None or not all(isinstance(item, str) for item in items):
            raise UserError(f"{path}={value!r} should be a list of strings")
        return tuple(items)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{path}={value!r} should be a mapping")
        if arguments[1] is str and not all(isinstance(item, str) for item in typing.cast("Any", value).values()):
            raise UserError(f"{path}={value!r} should be a mapping to texts")
        return typing.cast("dict[str, Any]", value)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML 1.1 reads 1e-6 as a string
        except (ValueError, OverflowError):
            raise UserError(f"{path}={value!r} should be a number") from None
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise UserError(f"{path}={value!r} should be {names.get(hint, hint)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path}={value!r} should be a finite number")
    return value
