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

MAX_SKIPPED = 1000
"""Problems in a row that cannot be used, before it is taken for certain that none can."""


class ReasoningGymPrompts:
    """Problems of a reasoning-gym task, drawn in order from its seeded, random-access stream.

    The state is `position` (and a count), so a resumed run draws the same problems. Held-out problems come from
    another seed, and a training problem with the same question as a held-out one is skipped.

    Attributes:
        held_out: the prompts to evaluate on.
        overlong: training prompts that were too long and left out so far; with `overlong_prompts="filter"`.
        held_out_overlong: the same of the held-out ones, for which the next ones stand in.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, max_prompt_tokens: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.position = 0
        self.overlong = 0
        self.held_out_overlong = 0
        self._train = _create_dataset(config, config.seed)
        self.held_out = self._hold_out(_create_dataset(config, config.eval_seed))
        self._held_out_texts = {prompt.text for prompt in self.held_out}

    @staticmethod
    def of(config: RunConfig, tokenizer: Tokenizer) -> ReasoningGymPrompts:
        """The source of a run: a prompt leaves room for the longest response."""
        room = config.model.max_sequence_length - config.rollout.max_response_tokens
        return ReasoningGymPrompts(config.data, tokenizer, room)

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` training prompts."""
        drawn: list[Prompt] = []
        skipped: list[str] = []  # since the last one that was drawn
        while len(drawn) < count:
            prompt = self._prompt(self.position, self._train[self.position % STREAM_SIZE])
            self.position += 1
            fits = self._fits(prompt)
            self.overlong += not fits
            if fits and prompt.text not in self._held_out_texts:
                drawn.append(prompt)
                skipped.clear()
                continue
            skipped.append("held out" if fits else "overlong")
            if len(skipped) < MAX_SKIPPED:
                continue
            if "overlong" in skipped:
                raise self._all_too_long(skipped.count("overlong"))
            raise UserError(
                f"data.task={self.config.task} with these task_args has no problem outside the held-out set; "
                "lower data.eval_prompts or widen data.task_args"
            )
        return drawn

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "overlong": self.overlong}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
        self.overlong = state.get("overlong", 0)  # older checkpoints have none

    def _hold_out(self, problems: Any) -> list[Prompt]:
        held_out: list[Prompt] = []
        overlong_in_a_row = 0
        for i in range(STREAM_SIZE):
            # A held-out prompt's id is negative: ids are unique across both sets.
            prompt = self._prompt(-1 - i, problems[i])
            if self._fits(prompt):
                held_out.append(prompt)
                overlong_in_a_row = 0
            else:
                self.held_out_overlong += 1
                overlong_in_a_row += 1
            if len(held_out) == self.config.eval_prompts:
                break
            if overlong_in_a_row == MAX_SKIPPED:
                raise self._all_too_long(overlong_in_a_row)
        return held_out

    def _fits(self, prompt: Prompt) -> bool:
        """Raises UserError for a prompt that is too long, unless these are to be left out."""
        fits = len(prompt.token_ids) <= self.max_prompt_tokens
        if not fits and self.config.overlong_prompts == "refuse":
            raise UserError(
                f"a prompt of data.task={self.config.task} has {len(prompt.token_ids)} tokens, "
                f"{self.max_prompt_tokens} fit beside the response; raise model.max_sequence_length, or leave such "
                "prompts out with data.overlong_prompts=filter"
            )
        return fits

    def _all_too_long(self, count: int) -> UserError:
        return UserError(
            f"data.overlong_prompts=filter leaves nothing of data.task={self.config.task}: of {MAX_SKIPPED} problems "
            f"in a row {count} have more than the {self.max_prompt_tokens} tokens that fit beside the response; raise "
            "model.max_sequence_length"
        )

    def _prompt(self, index: int, entry: dict[str, Any]) -> Prompt:
        try:
            text = self.config.prompt_template.format(**{**entry["metadata"], "question": entry["question"]})
        except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
            raise UserError(
                f"data.prompt_template: {type(error).__name__} {error}; the fields of {self.config.task} are "
                f"question, {', '.join(entry['metadata'])}"
            ) from None
        return Prompt(index, text, self.tokenizer.encode_prompt(text), entry)


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
