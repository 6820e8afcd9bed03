"""A verifier's result, and the part of a response that is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        score: from 0 to 1 (1: right).
        reason: why, in a word or two.
        error: the response could not be judged, for a reason outside of it.
        metrics: further numbers of the response; the loop logs their means over the responses that have them.
    """

    score: float
    reason: str
    error: bool = field(default=False, kw_only=True)
    metrics: Mapping[str, float] = field(default_factory=dict[str, float], kw_only=True, hash=False)


def after_reasoning(response: str) -> str:
    """The text behind the last `</think>`; empty if reasoning began and did not end."""
    after = response.rpartition("</think>")[2]
    return "" if "<think>" in after else after
