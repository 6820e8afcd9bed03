"""Where a response ends: the one rule of all engines."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_aspo.tokenizer import Tokenizer


class Stops:
    """A response ends with an end-of-sequence token, or with the token that completes a stop string in its text.

    A string is looked for in the text because a tokenizer may write it in many ways: the tokens of "\\n\\nUser" alone
    need not be those that end "well.\\n\\nUser". Special tokens are part of the text, so a string may name one. What
    the last token holds beyond the string stays: a response is cut between tokens only.

    Attributes:
        end_ids: the end-of-sequence tokens.
        strings: the stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self.end_ids = frozenset(tokenizer.eos_ids)
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        # A token has a byte of text or more. Before them one for context: a tokenizer may drop a leading space.
        self.window = 1 + max((len(string.encode()) for string in strings), default=0)

    def ended(self, response: Sequence[int]) -> bool:
        """Whether the response ends with its last token; to be asked at every token in turn. The last `window` tokens
        of a response do as well as all."""
        if not response:
            return False
        if response[-1] in self.end_ids:
            return True
        if not self.strings:
            return False
        text = self._tokenizer.decode(response[-self.window :], special=True)
        return any(string in text for string in self.strings)
