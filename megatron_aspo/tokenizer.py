"""Text to token ids and back: characters for models that start from random weights, else the model's own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any, Protocol

from megatron_aspo.config import RunConfig
from megatron_aspo.config_checks import check_hugging_face
from megatron_aspo.data.problem import Content
from megatron_aspo.errors import UserError


class Tokenizer(Protocol):
    """What the loop and the engines ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """The model's vocabulary, its padding not counted: all ids are below it."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a response, the one to end a demonstration with first."""
        ...

    @property
    def pad_id(self) -> int: ...

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a piece of text, such as an answer or a stop string, and nothing besides."""
        ...

    def encode_prompt(self, content: Content) -> tuple[int, ...]:
        """The tokens of a prompt, a text or messages, with what the model expects before and after it."""
        ...

    def decode(self, token_ids: Iterable[int], special: bool = False) -> str:
        """The text, without special tokens unless they are asked for."""
        ...


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of `model.hf_path`, or characters."""
    if config.model.hf_path:
        check_hugging_face()
        return HuggingFaceTokenizer(config.model.hf_path, config.data.chat_template)
    return AsciiTokenizer()


class AsciiTokenizer:
    """A token is an ASCII code; the control character EOT ends a sequence, NUL pads."""

    vocab_size = 128
    eos_id = 4
    eos_ids = (eos_id,)
    pad_id = 0

    def encode(self, text: str) -> tuple[int, ...]:
        """Raises UserError for a character that is not ASCII."""
        if not text.isascii():
            bad = next(c for c in text if not c.isascii())
            raise UserError(f"the character tokenizer knows ASCII only, and {text[:40]!r} contains {bad!r}")
        return tuple(text.encode("ascii"))

    def encode_prompt(self, content: Content) -> tuple[int, ...]:
        return self.encode(_joined(content))

    def decode(self, token_ids: Iterable[int], special: bool = False) -> str:
        """The text (all ids are below 128), without control characters unless they are asked for."""
        return "".join(c for c in map(chr, token_ids) if special or c.isprintable() or c in "\n\t")


class HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder or hub id.

    Args:
        chat_template: a prompt is a user's message (or the messages it consists of), followed by the beginning of the
            assistant's answer.

    Raises:
        UserError: no tokenizer there, or none with a chat template where one is asked for.
    """

    def __init__(self, path: str, chat_template: bool = False) -> None:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns whenever a process forks
        try:
            config = AutoConfig.from_pretrained(path)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise unreadable(path, error) from None
        try:
            generation: Any = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # the file is optional
            generation = None
        self.chat_template = chat_template
        if chat_template and not self._tokenizer.chat_template:
            raise UserError(f"the tokenizer of model.hf_path={path} has no chat template; set data.chat_template=false")
        # Some models have more rows of embeddings than their tokenizer has tokens, and none may have fewer.
        self.vocab_size: int = config.vocab_size
        if len(self._tokenizer) > self.vocab_size:
            raise UserError(
                f"model.hf_path={path}: the tokenizer has {len(self._tokenizer)} tokens, the model {self.vocab_size}; "
                "they do not belong together"
            )
        ids = [self._tokenizer.eos_token_id, *(generation if isinstance(generation, list) else [generation])]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ids if i is not None))
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = 0 if pad is None else pad

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_prompt(self, content: Content) -> tuple[int, ...]:
        if not self.chat_template:
            return tuple(self._tokenizer.encode(_joined(content)))
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        try:
            chat = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:  # some take no system message, or want user and assistant in turns
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the model's chat template refuses messages of {roles}: {error}; change the prompts, or set "
                "data.chat_template=false"
            ) from None
        return self.encode(chat)  # the template wrote the special tokens

    def decode(self, token_ids: Iterable[int], special: bool = False) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=not special)


def _joined(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(message["content"] for message in content)


def unreadable(path: str, error: Exception) -> UserError:
    """What is said of a `model.hf_path` that transformers cannot read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"cannot read model.hf_path={path}: {reason}; give a folder with config.json, *.safetensors and the "
        "tokenizer's files, or the id of a model on the hub"
    )
