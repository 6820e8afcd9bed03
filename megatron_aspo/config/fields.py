"""Types of settings and how pydantic validates them."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

SETTINGS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)
"""Refuse unknown settings, values of another type (`true` is not 1, "1" is not 1), infinity and NaN. A whole number is
accepted for a float. Validators are built at first use: `megatron-aspo --help` needs none."""

Text = Annotated[str, Field(strict=False, coerce_numbers_to_str=True)]
"""A string. YAML reads a name such as 7 as a number, which is accepted."""

Name = Annotated[str, Field(min_length=1)]

Fraction = Annotated[float, Field(ge=0, le=1)]
