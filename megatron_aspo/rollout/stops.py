"""The rule by which a response ends, shared by all engines."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_aspo.data.tokenizer import Tokenizer


class Stops:
    """A response ends with an end-of-sequence token, or with the token that completes a stop string in its text.

    Stop strings are matched in the text, because a tokenizer can write a string in many ways: the tokens of
    "\\n\\nUser" alone need not be those that end "well.\\n\\nUser". The text includes special tokens. A response is
    cut between tokens only, so text of the last token beyond the string stays.

    Attributes:
        end_ids: the end-of-sequence tokens.
        strings: the stop strings.
        window: number of last tokens that decide whether a response has ended.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self.end_ids = frozenset(tokenizer.eos_ids)
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        # Each token has at least one byte. One more gives context, as a tokenizer may drop a leading space.
        self.window = 1 + max((len(string.encode()) for string in strings), default=0)

    def ended(self, response: Sequence[int]) -> bool:
        """Whether the last token ends the response. Must be called for every token in turn; the last `window` tokens
        of the response suffice."""
        if not response:
            return False
        if response[-1] in self.end_ids:
            return True
        if not self.strings:
            return False
        text = self._tokenizer.decode(response[-self.window :], special=True)
        return any(string in text for string in self.strings)
