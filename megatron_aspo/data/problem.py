"""Problems as sources have them, before templates and tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

Content = str | list[dict[str, str]]
"""A text, or a chat: messages with `role` and `content`."""


@dataclass(frozen=True)
class Problem:
    """Attributes:
    content: the question.
    fields: values for the prompt template.
    entry: the verifier's input; with `answer`.
    data_source: its origin, for messages.
    """

    content: Content
    fields: dict[str, Any]
    entry: dict[str, Any]
    data_source: str


class Source(Protocol):
    """An endless, random-access, shuffled stream of problems. A source with a length (`__len__`) repeats after so many,
    and no more are held out."""

    def problem(self, position: int) -> Problem:
        """The problem at a position >= 0; always the same one."""
        ...
