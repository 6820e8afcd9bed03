"""Prompt sources: an endless, shuffled, exactly resumable stream of training prompts and a fixed held-out set."""

from __future__ import annotations

import warnings
from typing import Any

from megatron_aspo.config import DataConfig, RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.tokenizer import Tokenizer
from megatron_aspo.types import Prompt

STREAM_SIZE = 1 << 20
"""Problems of a stream before it begins again; some tasks make a list of that length."""


class ReasoningGymPrompts:
    """Problems of a reasoning-gym task, drawn in order from its seeded, random-access stream.

    The state is one number, `position`, so a resumed run draws the same problems. Held-out problems come from
    another seed, and a training problem with the same question as a held-out one is skipped.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, max_prompt_tokens: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.position = 0
        self._train = _create_dataset(config, config.seed)
        held_out = _create_dataset(config, config.eval_seed)
        # A held-out prompt's id is negative: ids are unique across both sets.
        self.held_out = [self._prompt(-1 - i, held_out[i]) for i in range(config.eval_prompts)]
        self._held_out_texts = {prompt.text for prompt in self.held_out}

    @staticmethod
    def of(config: RunConfig, tokenizer: Tokenizer) -> ReasoningGymPrompts:
        """The source of a run: a prompt leaves room for the longest response."""
        room = config.model.max_sequence_length - config.rollout.max_response_tokens
        return ReasoningGymPrompts(config.data, tokenizer, room)

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` training prompts."""
        drawn: list[Prompt] = []
        skipped = 0
        while len(drawn) < count:
            prompt = self._prompt(self.position, self._train[self.position % STREAM_SIZE])
            self.position += 1
            if prompt.text not in self._held_out_texts:
                drawn.append(prompt)
                skipped = 0
                continue
            skipped += 1
            if skipped > 1000:
                raise UserError(
                    f"data.task={self.config.task} with these task_args has no problem outside the held-out set; "
                    "lower data.eval_prompts or widen data.task_args"
                )
        return drawn

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]

    def _prompt(self, index: int, entry: dict[str, Any]) -> Prompt:
        try:
            text = self.config.prompt_template.format(**{**entry["metadata"], "question": entry["question"]})
        except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
            raise UserError(
                f"data.prompt_template: {type(error).__name__} {error}; the fields of {self.config.task} are "
                f"question, {', '.join(entry['metadata'])}"
            ) from None
        token_ids = self.tokenizer.encode_prompt(text)
        if len(token_ids) > self.max_prompt_tokens:
            raise UserError(
                f"a prompt of data.task={self.config.task} has {len(token_ids)} tokens, "
                f"{self.max_prompt_tokens} fit beside the response; raise model.max_sequence_length"
            )
        return Prompt(index, text, token_ids, entry)


def import_reasoning_gym() -> Any:
    """Lazily, because the import takes seconds; one of its dependencies warns of its own syntax when compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym

    return reasoning_gym


def _create_dataset(config: DataConfig, seed: int) -> Any:
    reasoning_gym = import_reasoning_gym()
    known = reasoning_gym.factory.DATASETS
    if config.task not in known:
        raise UserError(
            f"reasoning-gym has no task {config.task!r}; it has {len(known)}, among them chain_sum, "
            "basic_arithmetic, products, gcd, count_bits"
        )
    try:
        return reasoning_gym.create_dataset(config.task, seed=seed, size=STREAM_SIZE, **config.task_args)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"data.task_args do not fit reasoning-gym's {config.task}: {error}") from None
