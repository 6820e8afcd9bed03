"""Share of a response's n-grams that occurred earlier in the same response."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TOKENS = 4
"""n for tokens."""

WORDS = 20
"""n for words, as in Archer: a repeated n-gram is then a loop, not an idiom."""


def token_repetition(token_ids: Sequence[int] | npt.NDArray[np.int32], n: int = TOKENS) -> float:
    """1 - (distinct n-grams) / (n-grams) of non-negative ids; 0 for a response of at most n tokens.

    Numbers pairs of neighbouring grams: log2(n) sorts of integers replace a set of tuples.
    """
    windows = len(token_ids) - n + 1
    if windows < 2:
        return 0.0
    grams = np.asarray(token_ids, dtype=np.int64)
    length, distinct = 1, int(grams.max()) + 1
    while length < n:
        step = min(length, n - length)  # two grams of `length`, `step` apart, cover a gram of `length + step`
        numbers, grams = np.unique(grams[:-step] * distinct + grams[step:], return_inverse=True)
        length, distinct = length + step, len(numbers)
        if distinct == len(grams):
            return 0.0
    return 1 - distinct / windows


def word_repetition(text: str, n: int = WORDS) -> float:
    """`token_repetition` of the words of a text, separated by white space."""
    numbers: dict[str, int] = {}
    return token_repetition([numbers.setdefault(word, len(numbers)) for word in text.split()], n)
