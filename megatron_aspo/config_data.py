"""Settings of prompts: where problems come from, and who judges the answers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from megatron_aspo.config_rules import require, require_known, require_positive

REWARDS = ("reasoning_gym", "math", "code")
"""The verifiers that come with the package; any other is named by its import path, module:function."""


@dataclass(frozen=True)
class CurriculumStage:
    """From the `after`-th problem on a task's parameters are these (over those of `task_args`)."""

    after: int
    task_args: dict[str, Any]


@dataclass(frozen=True)
class SourceConfig:
    """Where problems come from: a procedural task of reasoning-gym, or files.

    Attributes:
        task: of reasoning-gym, by name; its own verifier scores the answers.
        task_args: its parameters.
        curriculum: stages of other `task_args`.
        path: `*.parquet`, `*.jsonl` or `*.json` files, a pattern of them, or a folder.
        eval_path: the same for held-out problems; empty: some of `path` are held out of training.
        columns: which column is the `prompt` (text, or a list of messages with role and content), the `answer` and the
            `data_source`, where the usual names are not there; a dotted name leads into a column of records. Of code
            the `answer` is the tests.
        reward: who scores the answers: math, code, or `module:function`, which is called with the response's text and
            the row and returns a number. Empty: reasoning_gym for a task, math for files.
        prompt_template: may name `{prompt}` (a task's is `{question}`) and the other columns (math keeps the answer
            alone), or a task's metadata. It rewrites the last of a list of messages. Empty: the prompt as it is,
            followed by a line break for a task.
        weight: this source's share of the prompts, relative to the others'.
    """

    task: str = ""
    task_args: dict[str, Any] = field(default_factory=dict[str, Any])
    curriculum: tuple[CurriculumStage, ...] = ()
    path: str = ""
    eval_path: str = ""
    columns: dict[str, str] = field(default_factory=dict[str, str])
    reward: str = ""
    prompt_template: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(not (self.task and self.path), f"task={self.task} and path={self.path} are two sources; remove one")
        for name in ("path", "eval_path", "columns", "reward"):
            require(
                bool(self.path) or not getattr(self, name), f"{name}={getattr(self, name)} is for files; set path too"
            )
        for name in ("task_args", "curriculum"):
            require(not (self.path and getattr(self, name)), f"{name} is for a task, and path={self.path} is a file")
        for name in self.columns:
            require(
                name in ("prompt", "answer", "data_source"),
                f"columns has {name}, which is not one of prompt, answer, data_source",
            )
        for name, column in self.columns.items():
            require(bool(column), f"columns.{name} must be a column's name")
        if self.reward:
            require_known("reward", self.reward, REWARDS)
        require(self.reward != "reasoning_gym", "reward=reasoning_gym is for a task, not for files; set math or code")
        template = self.prompt_template
        require(not template or "{" in template, "prompt_template must contain a field, such as {prompt}")
        afters = [stage.after for stage in self.curriculum]
        require(
            all(a > 0 for a in afters) and afters == sorted(set(afters)),
            f"curriculum: after={afters} must be > 0 and grow from stage to stage",
        )
        require_positive(self, "weight")

    @property
    def template(self) -> str:
        return self.prompt_template or ("{question}\n" if self.task else "{prompt}")

    @property
    def verifier(self) -> str:
        """Who scores the answers."""
        return self.reward or ("reasoning_gym" if self.task else "math")

    @property
    def label(self) -> str:
        """Of messages."""
        if not self.task and not self.path:
            return "the prompts that were passed"
        return f"data.path={self.path}" if self.path else f"data.task={self.task}"


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The prompts: of the one source given right here, or of several `sources`.

    Training prompts are drawn with `seed`, held-out prompts with `eval_seed`; an evaluation prompt never occurs in
    training. With `chat_template` a text is a user's message, in the chat format of the tokenizer of `model.hf_path`;
    without, messages are joined by line breaks.

    Attributes:
        sources: drawn from by their weights, in a fixed order; each is a mapping with the settings above.
        chat_template: format prompts as a chat.
        seed, eval_seed: of the order of training prompts, and of the choice of held-out ones.
        eval_prompts: how many are held out, of all sources together, by their weights.
        overlong_prompts: of a prompt that does not fit into `model.max_sequence_length` beside the longest
            response: "refuse" ends the run, "filter" takes the next problem instead, and counts.
        cache_dir: files are read once and kept there in a form that is mapped into memory.
    """

    sources: tuple[SourceConfig, ...] = ()
    chat_template: bool = False
    seed: int = 0
    eval_seed: int = 1_000_003
    eval_prompts: int = 256
    overlong_prompts: Literal["refuse", "filter"] = "refuse"
    cache_dir: str = "runs/cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f.name for f in fields(SourceConfig) if f.name != "weight" and getattr(self, f.name)]
        require(
            not self.sources or not given,
            f"{', '.join(given)} stands beside sources; move it into one of them",
        )
        for i, source in enumerate(self.sources):
            require(bool(source.task or source.path), f"sources.{i} has neither a task nor a path; set one")
        require_positive(self, "eval_prompts")
        for name in ("seed", "eval_seed"):
            require(0 <= getattr(self, name) < 1 << 30, f"{name}={getattr(self, name)} must lie in [0, 2^30)")
        require(self.seed != self.eval_seed, "seed and eval_seed must differ, or evaluation is not held out")

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        if self.sources:
            return self.sources
        one = SourceConfig(**{f.name: getattr(self, f.name) for f in fields(SourceConfig)})
        return (one if one.task or one.path else replace(one, task="chain_sum"),)

    @property
    def name(self) -> str:
        """Of all sources together, in messages."""
        return " + ".join(source.label for source in self.all_sources)
