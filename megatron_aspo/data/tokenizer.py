"""Tokenizers: a Hugging Face model's own, and characters for models that start from random weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.installed import check_hugging_face
from megatron_aspo.config.model import ModelConfig
from megatron_aspo.data.problem import Content
from megatron_aspo.errors import UserError

WITH_IMAGES = ("qwen3_5", "qwen3_5_moe")
"""Values of `model_type` of models published with a vision encoder, whose text model is trained."""


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        vocab_size: upper bound of the ids: the model's vocabulary without padding.
    """

    vocab_size: int
    pad_id: int

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a response. The first ends demonstrations."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, such as an answer or a stop string, without special tokens."""
        ...

    def encode_prompt(self, content: Content) -> tuple[int, ...]:
        """The tokens of a prompt, with the special tokens that the model expects around it."""
        ...

    def decode(self, token_ids: Iterable[int], special: bool = False) -> str:
        """The text, with special tokens only if `special`."""
        ...


def load_tokenizer(model: ModelConfig, data: DataConfig) -> Tokenizer:
    """The tokenizer of `model.hf_path`, or characters."""
    if model.hf_path:
        check_hugging_face()
        return HuggingFaceTokenizer(model.hf_path, data.chat_template, data.chat_template_args)
    return AsciiTokenizer()


class AsciiTokenizer:
    """ASCII codes as tokens. The control character EOT ends a sequence, NUL pads."""

    vocab_size = 128
    eos_id = 4
    eos_ids = (eos_id,)
    pad_id = 0

    def encode(self, text: str) -> tuple[int, ...]:
        """Raises UserError for a character that is not ASCII."""
        if not text.isascii():
            bad = next(c for c in text if not c.isascii())
            raise UserError(
                f"{text[:40]!r} contains {bad!r}, and without model.hf_path the tokenizer has ASCII characters only"
            )
        return tuple(text.encode("ascii"))

    def encode_prompt(self, content: Content) -> tuple[int, ...]:
        return self.encode(_joined(content))

    def decode(self, token_ids: Iterable[int], special: bool = False) -> str:
        return "".join(c for c in map(chr, token_ids) if special or c.isprintable() or c in "\n\t")


class HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder or hub id.

    Args:
        chat_template: write a prompt as messages (a text as a user's), followed by the start of the assistant's.
        template_args: variables of the chat template.

    Raises:
        UserError: the path has no tokenizer, or a tokenizer whose chat template is missing or lacks a variable.
    """

    def __init__(self, path: str, chat_template: bool = False, template_args: Mapping[str, Any] | None = None) -> None:
        from transformers import AutoTokenizer, GenerationConfig

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns at every fork
        try:
            config = read_hf_config(path)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise unreadable(path, error) from None
        try:
            ends: Any = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # the file is optional
            ends = None
        self.chat_template = chat_template
        if chat_template and not self._tokenizer.chat_template:
            raise UserError(f"the tokenizer of model.hf_path={path} has no chat template; set data.chat_template=false")
        self.template_args = dict(template_args or {})
        # Jinja ignores a variable that the template lacks, and the run would go on without its setting.
        for name in self.template_args:
            if not re.search(rf"\b{re.escape(name)}\b", self._tokenizer.get_chat_template()):
                raise UserError(
                    f"the chat template of model.hf_path={path} has no variable {name}; correct or remove it in "
                    "data.chat_template_args"
                )
        # A model may have more rows of embeddings than its tokenizer has tokens, but not fewer.
        self.vocab_size: int = config.vocab_size
        if len(self._tokenizer) > self.vocab_size:
            raise UserError(
                f"model.hf_path={path}: the tokenizer has {len(self._tokenizer)} tokens, the model {self.vocab_size}; "
                "they do not belong together"
            )
        ids = [self._tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ids if i is not None))
        self.pad_id: int = self._tokenizer.pad_token_id or 0

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_prompt(self, content: Content) -> tuple[int, ...]:
        if not self.chat_template:
            return tuple(self._tokenizer.encode(_joined(content)))
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        try:
            chat = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self.template_args
            )
        except TemplateError as error:  # some templates take no system message, or require alternating roles
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


def text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that concern its text model: all, unless the model also reads images."""
    kind, text = config.get("model_type"), config.get("text_config")
    if kind not in WITH_IMAGES or not isinstance(text, dict):
        return config
    names = [name.replace("ForConditionalGeneration", "ForCausalLM") for name in config.get("architectures") or ()]
    outer: dict[str, Any] = {"architectures": names}
    # transformers ties the whole model by this field alone, not by `text_config`'s.
    outer["tie_word_embeddings"] = bool(config.get("tie_word_embeddings"))
    if config.get("quantization_config"):
        outer["quantization_config"] = config["quantization_config"]
    return {"model_type": f"{kind}_text"} | text | outer


def read_hf_config(path: str) -> Any:
    """transformers' configuration of the text model in a folder or hub id. Kimi-K2 is DeepSeek-V3 under a name unknown
    to it."""
    from transformers import AutoConfig, DeepseekV3Config
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING.register("kimi_k2", DeepseekV3Config, exist_ok=True)
    config = AutoConfig.from_pretrained(path)
    if config.model_type in WITH_IMAGES:
        config = AutoConfig.for_model(**text_settings(config.to_dict()))
    setattr(config, "model_type", type(config).model_type)  # noqa: B010
    return config


def unreadable(path: str, error: Exception) -> UserError:
    """The error for a `model.hf_path` that transformers cannot read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"cannot read model.hf_path={path}: {reason}; give a folder with config.json, *.safetensors and the "
        "tokenizer's files, or the id of a model on the hub"
    )
