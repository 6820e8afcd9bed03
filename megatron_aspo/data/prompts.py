"""An endless, exactly resumable stream of training prompts, and a fixed held-out set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from typing import TYPE_CHECKING, Any

from megatron_aspo.batch import Prompt
from megatron_aspo.config.data import DataConfig, SourceConfig
from megatron_aspo.data.problem import Problem, Source
from megatron_aspo.errors import UserError

if TYPE_CHECKING:
    from megatron_aspo.data.tokenizer import Tokenizer

MAX_SKIPPED = 1000
"""Problems in a row that cannot be used, after which the run ends."""

SourceClass = Callable[[int], Source]
"""Makes a source: called with `data.seed` for training and with `data.eval_seed` for held-out problems."""


class PromptStream:
    """Prompts of one or more sources, in an order that the seeds and the weights determine.

    The state is the position in every source, so a resumed run draws the same problems. Held-out problems come from
    another seed or other files. A training prompt with the text of a held-out one is skipped.

    Args:
        source: makes the problems in place of the configured sources.

    Attributes:
        held_out: the prompts to evaluate on.
        overlong: number of training prompts left out because of their length (`overlong_prompts="filter"`).
        held_out_overlong: the same number for held-out prompts, which the next ones replace.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, max_prompt_tokens: int, source: SourceClass | None = None
    ) -> None:
        self.config, self.tokenizer, self.max_prompt_tokens = config, tokenizer, max_prompt_tokens
        passed = SourceConfig(prompt_template=config.prompt_template)
        configs = config.all_sources if source is None else (passed,)
        self.name = " + ".join(each.label for each in configs)

        def open_mixture(seed: int, held_out: bool) -> _Mixture:
            opened = [source(seed) if source else open_source(each, config, seed, held_out) for each in configs]
            return _Mixture(configs, opened, held_out)

        self._held_out_texts = frozenset[str]()
        self.held_out, self.held_out_overlong = self._draw(open_mixture(config.eval_seed, True), config.eval_prompts)
        if not self.held_out:
            raise self._nothing_to_use(self.held_out_overlong, 0)
        self._held_out_texts = frozenset(prompt.text for prompt in self.held_out)
        self._training = open_mixture(config.seed, False)
        self.overlong = 0

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` training prompts."""
        drawn, overlong = self._draw(self._training, count)
        self.overlong += overlong
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {"positions": list(self._training.positions), "overlong": self.overlong}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for a state of other sources."""
        before, now = len(state["positions"]), len(self._training.positions)
        if before != now:
            raise UserError(
                f"the checkpoint was made with {before} data.sources and there are {now} now; resume with the same, or "
                "start anew from its weights"
            )
        self._training.positions = list(state["positions"])
        self.overlong = state["overlong"]

    def _draw(self, mixture: _Mixture, count: int) -> tuple[list[Prompt], int]:
        """Return the next prompts that can be used, fewer than `count` if there are no more, and the number of overlong
        ones before them."""
        drawn: list[Prompt] = []
        overlong = 0
        skipped: list[str] = []  # since the last drawn prompt
        while len(drawn) < count and (prompt := mixture.next(self.tokenizer)) is not None:
            if not self._fits(prompt):
                overlong += 1
                skipped.append("overlong")
            elif prompt.text in self._held_out_texts:
                skipped.append("held out")
            else:
                drawn.append(prompt)
                skipped.clear()
            if len(skipped) == MAX_SKIPPED:
                raise self._nothing_to_use(skipped.count("overlong"), skipped.count("held out"))
        return drawn, overlong

    def _fits(self, prompt: Prompt) -> bool:
        """Whether a response fits behind the prompt. Raises UserError if not, with `overlong_prompts="refuse"`."""
        fits = len(prompt.token_ids) <= self.max_prompt_tokens
        if not fits and self.config.overlong_prompts == "refuse":
            raise UserError(
                f"a prompt of {self.name} has {len(prompt.token_ids)} tokens, "
                f"{self.max_prompt_tokens} fit beside the response; raise model.max_sequence_length, or leave such "
                "prompts out with data.overlong_prompts=filter"
            )
        return fits

    def _nothing_to_use(self, overlong: int, held_out: int) -> UserError:
        reasons: list[str] = []
        if overlong:
            reasons.append(
                f"{overlong} have more than the {self.max_prompt_tokens} tokens that fit beside the response "
                "(data.overlong_prompts=filter); raise model.max_sequence_length"
            )
        if held_out:
            reasons.append(f"{held_out} are held out; lower data.eval_prompts={self.config.eval_prompts}")
        if not reasons:
            return UserError(f"{self.name} has no problems; give a source that has some")
        problems = f"none of {overlong + held_out} problems in a row can be used"
        return UserError(f"{self.name}: {problems}: {', and '.join(reasons)}, or give other problems")


class _Mixture:
    """Problems of several sources. The next one comes from the source furthest behind its share, so that the shares are
    exact at any time, without random numbers.

    Args:
        held_out: end a source with a length after so many problems.
    """

    def __init__(self, configs: Sequence[SourceConfig], sources: Sequence[Source], held_out: bool) -> None:
        self._configs, self._sources, self._held_out = configs, sources, held_out
        self._ends = [len(s) if held_out and isinstance(s, Sized) else math.inf for s in sources]
        self.positions = [0] * len(sources)

    def next(self, tokenizer: Tokenizer) -> Prompt | None:
        """The next problem's prompt; None at the end of all sources."""
        weights = [source.weight for source in self._configs]
        due = (sum(self.positions) + 1) / sum(weights)
        behind = {
            i: due * weight - position
            for i, (weight, position) in enumerate(zip(weights, self.positions, strict=True))
            if position < self._ends[i]
        }
        if not behind:
            return None
        chosen = max(behind, key=behind.__getitem__)  # the first of equals
        position = self.positions[chosen]
        self.positions[chosen] += 1
        # Unique across sources and both sets; one source's ids are its positions, negative for held-out prompts.
        number = position * len(self._sources) + chosen
        problem = self._sources[chosen].problem(position)
        return make_prompt(-1 - number if self._held_out else number, problem, self._configs[chosen], tokenizer)


def open_source(source: SourceConfig, config: DataConfig, seed: int, held_out: bool = False) -> Source:
    """The problems of a source. Held-out ones come from its `eval_path`, if set."""
    if source.path:
        from megatron_aspo.data.files import FileSource

        return FileSource(source, seed, config.cache_dir, eval_set=held_out and bool(source.eval_path))
    from megatron_aspo.data.tasks import TaskSource

    return TaskSource(source, seed)


def make_prompt(number: int, problem: Problem, source: SourceConfig, tokenizer: Tokenizer) -> Prompt:
    """The prompt of a problem in its source's template, which rewrites the last of several messages; tokenized."""
    messages = problem.content if isinstance(problem.content, list) else [{"content": problem.content}]
    last = messages[-1]["content"]
    values = problem.fields | ({} if source.task else {"prompt": last})
    try:
        text = source.template.format(**values)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"data.prompt_template: {type(error).__name__} {error}; the fields of {source.label} are "
            f"{', '.join(values)}"
        ) from None
    content = text if isinstance(problem.content, str) else [*messages[:-1], {**messages[-1], "content": text}]
    texts = [message["content"] for message in messages[:-1]] + [text]
    return Prompt(
        number, "\n".join(texts), tokenizer.encode_prompt(content), problem.entry, source.verifier, problem.data_source
    )
