"""A character tokenizer for models that are trained here from random weights."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_aspo.errors import UserError


class AsciiTokenizer:
    """A token is an ASCII code; the control character EOT ends a sequence, NUL pads."""

    vocab_size = 128
    eos_id = 4
    pad_id = 0

    def encode(self, text: str) -> tuple[int, ...]:
        """Raises UserError for a character that is not ASCII."""
        if not text.isascii():
            bad = next(c for c in text if not c.isascii())
            raise UserError(f"the character tokenizer knows ASCII only, and {text[:40]!r} contains {bad!r}")
        return tuple(text.encode("ascii"))

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text without control characters (all ids are below 128)."""
        return "".join(c for c in map(chr, token_ids) if c.isprintable() or c in "\n\t")
