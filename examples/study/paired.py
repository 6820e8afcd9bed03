"""Tests on paired differences: Student's t, equivalence (TOST), exact sign test (McNemar), Holm's correction.

Differences lie along the last axis of an array. Leading axes are independent data sets, so that a simulation tests
thousands of them at once.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]


def student_tail(t: ArrayLike, df: int) -> Numbers:
    """Return P(T > t) under Student's t with `df` degrees of freedom; absolute error below 1e-14.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4, finite series for integer `df`.
    """
    angle = np.arctan(np.asarray(t, dtype=np.float64) / math.sqrt(df))
    sine, cosine = np.sin(angle), np.cos(angle)
    series, term = np.zeros_like(angle), np.ones_like(angle)
    even = df % 2 == 0
    for i in range(1, df // 2 + 1):
        series = series + term
        term = term * cosine**2 * ((2 * i - 1) / (2 * i) if even else 2 * i / (2 * i + 1))
    inside = sine * series if even else 2 / math.pi * (angle + sine * cosine * series)
    return (1 - inside) / 2


@cache
def student_quantile(p: float, df: int) -> float:
    """Return the t that T exceeds with probability 1 - p, for 0.5 < p < 1."""
    low, high = 0.0, 1.0
    while student_tail(high, df) > 1 - p:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, df) > 1 - p else (low, middle)
    return (low + high) / 2


def interval(differences: ArrayLike, level: float = 0.95) -> tuple[Numbers, Numbers, Numbers]:
    """Return the mean and both ends of its interval by Student's t. The ends of a single difference are infinite."""
    d = np.asarray(differences, dtype=np.float64)
    mean, n = d.mean(-1), d.shape[-1]
    if n < 2:
        return mean, np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
    half = student_quantile((1 + level) / 2, n - 1) * d.std(-1, ddof=1) / math.sqrt(n)
    return mean, mean - half, mean + half


def t_test(differences: ArrayLike, null: float = 0.0) -> tuple[Numbers, Numbers]:
    """Return (P(T > t), P(T < t)): one-sided p-values of "mean above `null`" and "mean below `null`".

    Differences without any spread are no evidence against `null` where they equal it, and complete evidence elsewhere.
    """
    d = np.asarray(differences, dtype=np.float64)
    error = d.std(-1, ddof=1) / math.sqrt(d.shape[-1])
    distance = d.mean(-1) - null
    # Rounding leaves a spread of 1e-17 among equal numbers.
    flat = error <= 1e-12 * np.abs(d).max(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(flat, np.sign(distance) * np.inf, distance / error)
    t = np.where(flat & (np.abs(distance) <= 1e-12), 0.0, t)
    above = student_tail(t, d.shape[-1] - 1)
    return above, 1 - above


def two_sided(differences: ArrayLike, null: float = 0.0) -> Numbers:
    return np.minimum(1.0, 2 * np.minimum(*t_test(differences, null)))


def tost(differences: ArrayLike, margin: float) -> Numbers:
    """Return the p-value of "the mean lies within ± `margin`" by two one-sided t-tests (Schuirmann, 1987)."""
    return np.maximum(t_test(differences, -margin)[0], t_test(differences, margin)[1])


def sign_test(differences: ArrayLike) -> Numbers:
    """Return the exact two-sided p-value of the sign test. Differences of 0 are dropped.

    For differences of yes (1) and no (0) this is McNemar's exact test.
    """
    d = np.asarray(differences, dtype=np.float64)
    above, below = (d > 0).sum(-1), (d < 0).sum(-1)
    n = d.shape[-1]
    # tail[m, k] = P(at most k heads of m fair coins)
    tail = np.array([[sum(math.comb(m, i) for i in range(k + 1)) / 2**m for k in range(n + 1)] for m in range(n + 1)])
    return np.minimum(1.0, 2 * tail[above + below, np.minimum(above, below)])


def holm(p: ArrayLike) -> Numbers:
    """Return p-values adjusted over the last axis (Holm, 1979): "adjusted ≤ α" has a family-wise error of at most α."""
    p = np.asarray(p, dtype=np.float64)
    order = p.argsort(-1)
    factors = np.arange(p.shape[-1], 0, -1)
    sorted_p = np.minimum(1.0, np.maximum.accumulate(np.take_along_axis(p, order, -1) * factors, -1))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, sorted_p, -1)
    return adjusted
