"""The character tokenizer."""

import string

import pytest

from megatron_aspo.errors import UserError
from megatron_aspo.tokenizer import AsciiTokenizer

TOKENIZER = AsciiTokenizer()


@pytest.mark.parametrize("text", ["", "12 + 34 =", "two\nlines\t", string.printable[:95]])
def test_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == tuple(map(ord, text))
    assert TOKENIZER.decode(ids) == text


def test_control_characters_are_not_text() -> None:
    ids = (TOKENIZER.pad_id, *TOKENIZER.encode("4 2"), TOKENIZER.eos_id, 127, 13)
    assert TOKENIZER.decode(ids) == "4 2"
    assert max(ids) < TOKENIZER.vocab_size


@pytest.mark.parametrize("text", ["3 × 4", "café", "naïve"])
def test_refuses_other_alphabets(text: str) -> None:
    with pytest.raises(UserError, match=f"knows ASCII only.*contains {next(c for c in text if ord(c) > 127)!r}"):
        TOKENIZER.encode(text)
