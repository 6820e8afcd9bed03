"""An endless, exactly resumable stream of training prompts, and a fixed held-out set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence, Sized
from typing import TYPE_CHECKING, Any

from megatron_aspo.config import RunConfig
from megatron_aspo.config_data import DataConfig, SourceConfig
from megatron_aspo.data.problem import Content, Problem, Source
from megatron_aspo.errors import UserError
from megatron_aspo.types import Prompt

if TYPE_CHECKING:
    from megatron_aspo.tokenizer import Tokenizer

MAX_SKIPPED = 1000
"""Problems in a row that cannot be used, before it is taken for certain that none can."""


SourceClass = Callable[[int], Source]
"""What makes a source: called with `data.seed` for training and with `data.eval_seed` for held-out problems."""


class PromptStream:
    """Prompts of one or more sources, drawn in an order that the seeds and the weights fix.

    The state is every source's position (and a count), so a resumed run draws the same problems. Held-out problems come
    from another seed or other files, and a training prompt with the same text as a held-out one is skipped.

    Attributes:
        held_out: the prompts to evaluate on.
        overlong: training prompts that were too long and left out so far; with `overlong_prompts="filter"`.
        held_out_overlong: the same of the held-out ones, for which the next ones stand in.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, max_prompt_tokens: int, source: SourceClass | None = None
    ) -> None:
        """`source` makes the problems in place of the configured sources."""
        self.config = config
        if source is None:
            self.source_configs = config.all_sources
        else:
            self.source_configs = (SourceConfig(prompt_template=config.prompt_template),)
        self._source_class = source
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.positions = [0] * len(self.source_configs)
        self.overlong = 0
        self.held_out_overlong = 0
        self.held_out = self._hold_out()
        self._held_out_texts = {prompt.text for prompt in self.held_out}
        self._sources = [self._open(source, config.seed) for source in self.source_configs]

    @staticmethod
    def of(config: RunConfig, tokenizer: Tokenizer, source: SourceClass | None = None) -> PromptStream:
        """The prompts of a run: one leaves room for the longest response."""
        room = config.model.max_sequence_length - config.rollout.max_response_tokens
        return PromptStream(config.data, tokenizer, room, source)

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` training prompts."""
        drawn: list[Prompt] = []
        skipped: list[str] = []  # since the last one that was drawn
        while len(drawn) < count:
            prompt = self._next()
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
            files = any(source.path for source in self.source_configs)
            raise UserError(
                f"{self.name} has no problem outside the held-out set; lower data.eval_prompts="
                f"{self.config.eval_prompts}, or {'give more problems' if files else 'widen data.task_args'}"
            )
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {"positions": list(self.positions), "overlong": self.overlong}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for a state of other sources."""
        if len(state["positions"]) != len(self.positions):
            raise UserError(
                f"the checkpoint was made with {len(state['positions'])} data.sources and there are "
                f"{len(self.positions)} now; resume with the same, or start anew from its weights"
            )
        self.positions = list(state["positions"])
        self.overlong = state["overlong"]

    def _next(self) -> Prompt:
        # The source that lags furthest behind its share: the mixture is exact at any time, and needs no generator.
        sources = self.source_configs
        due = (sum(self.positions) + 1) / sum(source.weight for source in sources)
        chosen = max(range(len(sources)), key=lambda i: (due * sources[i].weight - self.positions[i], -i))
        position = self.positions[chosen]
        self.positions[chosen] += 1
        # Unique across sources; one source's ids are its positions.
        number = position * len(sources) + chosen
        return make_prompt(number, self._sources[chosen].problem(position), sources[chosen], self.tokenizer)

    def _hold_out(self) -> list[Prompt]:
        held_out: list[Prompt] = []
        sources = self.source_configs
        for index, (source, count) in enumerate(zip(sources, shares(sources, self.config.eval_prompts), strict=True)):
            problems = self._open(source, self.config.eval_seed, held_out=True)
            available = len(problems) if isinstance(problems, Sized) else None
            taken = 0
            overlong_in_a_row = 0
            for i in itertools.count():
                if taken == count or i == available:
                    break
                # A held-out prompt's id is negative: ids are unique across both sets.
                prompt = make_prompt(-1 - i * len(sources) - index, problems.problem(i), source, self.tokenizer)
                if self._fits(prompt):
                    held_out.append(prompt)
                    taken += 1
                    overlong_in_a_row = 0
                    continue
                self.held_out_overlong += 1
                overlong_in_a_row += 1
                if overlong_in_a_row == MAX_SKIPPED:
                    raise self._all_too_long(overlong_in_a_row)
        if not held_out:
            raise self._all_too_long(self.held_out_overlong)
        return held_out

    @property
    def name(self) -> str:
        """Of all sources together, in messages."""
        return " + ".join(source.label for source in self.source_configs)

    def _open(self, source: SourceConfig, seed: int, held_out: bool = False) -> Source:
        if self._source_class is not None:
            return self._source_class(seed)
        return open_source(source, self.config, seed, held_out)

    def _fits(self, prompt: Prompt) -> bool:
        """Raises UserError for a prompt that is too long, unless these are to be left out."""
        fits = len(prompt.token_ids) <= self.max_prompt_tokens
        if not fits and self.config.overlong_prompts == "refuse":
            raise UserError(
                f"a prompt of {self.name} has {len(prompt.token_ids)} tokens, "
                f"{self.max_prompt_tokens} fit beside the response; raise model.max_sequence_length, or leave such "
                "prompts out with data.overlong_prompts=filter"
            )
        return fits

    def _all_too_long(self, count: int) -> UserError:
        return UserError(
            f"data.overlong_prompts=filter leaves nothing of {self.name}: of {max(count, MAX_SKIPPED)} problems "
            f"in a row {count} have more than the {self.max_prompt_tokens} tokens that fit beside the response; raise "
            "model.max_sequence_length"
        )


def make_prompt(number: int, problem: Problem, source: SourceConfig, tokenizer: Tokenizer) -> Prompt:
    """The problem in its source's template, tokenized."""
    content = _fill_template(problem, source)
    text = content if isinstance(content, str) else "\n".join(message["content"] for message in content)
    token_ids = tokenizer.encode_prompt(content)
    return Prompt(number, text, token_ids, problem.entry, source.verifier, problem.data_source)


def open_source(source: SourceConfig, config: DataConfig, seed: int, held_out: bool = False) -> Source:
    """The problems of a source; the held-out ones come from `eval_path` if it has one."""
    if source.path:
        from megatron_aspo.data.files import FileSource

        return FileSource(source, seed, config.cache_dir, eval_set=held_out and bool(source.eval_path))
    from megatron_aspo.data.tasks import TaskSource

    return TaskSource(source, seed)


def shares(sources: Sequence[SourceConfig], eval_prompts: int) -> list[int]:
    """`eval_prompts` parted by the sources' weights, the largest remainders rounded up."""
    exact = [eval_prompts * s.weight / sum(s.weight for s in sources) for s in sources]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: eval_prompts - sum(counts)]:
        counts[i] += 1
    return counts


def _fill_template(problem: Problem, source: SourceConfig) -> Content:
    """The problem's content in the source's template; of messages, the last."""
    messages = None if isinstance(problem.content, str) else problem.content
    last = problem.content if isinstance(problem.content, str) else problem.content[-1]["content"]
    values = problem.fields | ({} if source.task else {"prompt": last})
    try:
        text = source.template.format(**values)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"data.prompt_template: {type(error).__name__} {error}; the fields of {source.label} are "
            f"{', '.join(values)}"
        ) from None
    return text if messages is None else [*messages[:-1], {**messages[-1], "content": text}]
