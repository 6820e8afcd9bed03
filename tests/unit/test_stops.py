"""The stop rule on a tokenizer that can write the same text in several ways."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from megatron_aspo.data.problem import Content
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.rollout.stops import Stops


class Words:
    """A tokenizer whose tokens are several letters or bytes; it drops a leading space, as SentencePiece does."""

    tokens = tuple(
        token.encode() for token in ("<end>", "<turn>", "\n", "\n\n", "User", ".\n\n", "Us", "er", " a", "b")
    )
    tokens += (b"\xc3", b"\xa9", b":x")
    vocab_size = len(tokens)
    eos_ids = (0,)
    pad_id = 0

    def encode(self, text: str) -> tuple[int, ...]:
        return (self.tokens.index(text.encode()),)

    def encode_prompt(self, content: Content) -> tuple[int, ...]:
        return self.encode(str(content))

    def decode(self, token_ids: Iterable[int], special: bool = False) -> str:
        kept = (self.tokens[i] for i in token_ids if special or i > 1)
        return b"".join(kept).decode(errors="replace").removeprefix(" ")


def end(stops: Stops, response: list[bytes]) -> int | None:
    """The smallest length at which the response has ended, or None."""
    ids = [Words.tokens.index(token) for token in response]
    lengths = (length for length in range(len(ids) + 1) if stops.ended(ids[:length]))
    return next(lengths, None)


@pytest.mark.parametrize(
    ("strings", "response", "expected"),
    [
        ((), [b"b", b"<end>", b"b"], 2),
        ((), [b"b", b"b"], None),
        ((), [], None),
        (("\n\nUser",), [b"b", b"\n\n", b"User", b"b"], 3),
        (("\n\nUser",), [b"b", b".\n\n", b"Us", b"er", b"b"], 4),  # merged with the text before it, and split
        (("\n\nUser",), [b"b", b"\n", b"\n", b"Us", b"er"], 5),
        (("\n\nUser",), [b"\n", b"User", b"\n"], None),
        (("User:",), [b"b", b"User", b":x", b"b"], 3),  # the last token holds more than the string
        (("b", "User"), [b"Us", b"er", b"b"], 2),  # the first complete one
        (("é",), [b"b", b"\xc3", b"\xa9", b"b"], 3),  # a character of two tokens
        (("<turn>",), [b"b", b"<turn>", b"b"], 2),  # a special token
        ((" a",), [b"b", b" a", b"b"], 2),  # its space is kept at the edge of the window
    ],
)
def test_the_first_token_that_completes_a_string(
    strings: tuple[str, ...], response: list[bytes], expected: int | None
) -> None:
    assert end(Stops(Words(), strings), response) == expected


def test_the_window_is_enough() -> None:
    stops = Stops(Words(), ("\n\nUser", "é"))
    assert stops.window == 7
    long = [9] * 50 + [2, 2, 6, 7]
    assert stops.ended(long)
    assert stops.ended(long[-stops.window :])
    assert not stops.ended(long[:-1])


def test_characters() -> None:
    stops = Stops(AsciiTokenizer(), ("ab", "\x02"))
    found = [stops.ended(tuple(text.encode())) for text in ("xab", "abx", "a\x02", "a\x04", "b", "a\x00b")]
    assert found == [True, True, True, True, False, False]
