"""Runs of the study with chosen metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from design import Key
from numpy.typing import ArrayLike
from packed import Metrics


def metrics(train: Mapping[str, ArrayLike], evaluation: Mapping[str, float] | None = None, **key: Any) -> Metrics:
    """A run of three epochs with these columns, the last of which is its last evaluation."""
    steps = np.size(next(iter(train.values())))
    identity = {"block": "A", "arm": "aspo", "lr": 1.5e-4, "k": 0, "seed": 101} | key
    columns = {"step": np.arange(1, steps + 1), **{name: np.array(values) for name, values in train.items()}}
    last = {name: np.array([0.0, value]) for name, value in (evaluation or {}).items()}
    return Metrics(Key(**identity), steps, 3, columns, last)
