"""Import of the user's functions and classes, which settings name by `module:name`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from megatron_aspo.errors import UserError


def import_object(path: str, *parameters: str) -> Callable[..., Any]:
    """Return the function or class at `path`; UserError if it cannot be imported or does not take `parameters`, if any
    are given."""
    module, _, name = path.partition(":")
    try:
        imported = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot import {path}: {error}; is the name right, and its folder in PYTHONPATH?") from None
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"cannot import {path}: its module fails with {type(error).__name__}: {error}") from error
    if not callable(imported):
        raise UserError(f"{path} is not a function or class; name one as module:name")
    if parameters:
        check_signature(path, imported, *parameters)
    return imported


def check_signature(name: str, function: Callable[..., Any], *parameters: str) -> None:
    """Raise UserError unless `function` can be called with so many arguments by position."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # functions written in C may have no signature
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        raise UserError(f"{name}{signature} must take ({', '.join(parameters)}): {error}") from None
