"""Settings of prompts: the sources of problems and who scores the answers."""

from __future__ import annotations

from dataclasses import field, fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from megatron_aspo.config.fields import SETTINGS, Name, Text
from megatron_aspo.config.rules import require, require_known

REWARDS = ("reasoning_gym", "math", "code")
"""Built-in verifiers. Any other is named by its import path, module:function."""

Seed = Annotated[int, Field(ge=0, lt=1 << 30)]


@dataclass(frozen=True, config=SETTINGS)
class CurriculumStage:
    """From the `after`-th problem on, `task_args` override those of the source."""

    after: PositiveInt
    task_args: dict[str, Any]


@dataclass(frozen=True, config=SETTINGS)
class SourceConfig:
    """One source of problems: a procedural task of reasoning-gym, or files."""

    task: Text = ""
    """Name of a reasoning-gym task. Its own verifier scores the answers."""
    task_args: dict[str, Any] = field(default_factory=dict[str, Any])
    """Parameters of the task."""
    curriculum: tuple[CurriculumStage, ...] = ()
    """Stages with other `task_args`, in growing order of `after`."""
    path: Text = ""
    """`*.parquet`, `*.jsonl` or `*.json` files, a pattern of them, or a folder."""
    eval_path: Text = ""
    """The same for held-out problems. Empty: some problems of `path` are held out of training."""
    columns: dict[Literal["prompt", "answer", "data_source"], Name] = field(
        default_factory=dict[Literal["prompt", "answer", "data_source"], str]
    )
    """Names of the columns `prompt` (text, or a list of messages with role and content), `answer` and `data_source`,
    if they are not the usual ones. A dotted name is a path into a column of records. For code, `answer` has the
    tests."""
    reward: Text = ""
    """Verifier: math, code, or `module:function`, which is called with the response's text and the row and returns a
    number. Empty: reasoning_gym for a task, math for files."""
    prompt_template: Text = ""
    """Template with `{prompt}` (for a task `{question}`), other columns (math keeps only the answer) or a task's
    metadata. It rewrites the last of a list of messages. Empty: the prompt as it is, for a task with a line break."""
    weight: PositiveFloat = 1.0
    """Share of the prompts relative to the other sources."""

    def __post_init__(self) -> None:
        require(not (self.task and self.path), f"task={self.task} and path={self.path} are two sources; remove one")
        for name in ("eval_path", "columns", "reward"):
            value = getattr(self, name)
            require(bool(self.path) or not value, f"{name}={value} is for files; set path too")
        for name in ("task_args", "curriculum"):
            require(not (self.path and getattr(self, name)), f"{name} is for a task, and path={self.path} is a file")
        if self.reward:
            require_known("reward", self.reward, REWARDS)
        require(self.reward != "reasoning_gym", "reward=reasoning_gym is for a task, not for files; set math or code")
        template = self.prompt_template
        require(not template or "{" in template, "prompt_template must contain a field, such as {prompt}")
        starts = [stage.after for stage in self.curriculum]
        require(starts == sorted(set(starts)), f"curriculum has after={starts}, which must grow from stage to stage")

    @property
    def template(self) -> str:
        return self.prompt_template or ("{question}\n" if self.task else "{prompt}")

    @property
    def verifier(self) -> str:
        return self.reward or ("reasoning_gym" if self.task else "math")

    @property
    def label(self) -> str:
        """Name of the source in messages."""
        if not self.task and not self.path:
            return "the prompts that were passed"
        return f"data.path={self.path}" if self.path else f"data.task={self.task}"


@dataclass(frozen=True, config=SETTINGS)
class DataConfig(SourceConfig):
    """The prompts: from one source, configured here, or from several `sources`."""

    sources: tuple[SourceConfig, ...] = ()
    """Sources, each with the settings above. Prompts are drawn by weight, in a fixed order."""
    chat_template: bool = False
    """Format prompts with the chat template of `model.hf_path`'s tokenizer. Otherwise line breaks join messages."""
    chat_template_args: dict[str, Any] = field(default_factory=dict[str, Any])
    """Variables of the chat template, such as `enable_thinking: false` for Qwen3."""
    seed: Seed = 0
    """Seed of the order of training prompts."""
    eval_seed: Seed = 1_000_003
    """Seed that selects the held-out prompts. A held-out prompt never occurs in training."""
    eval_prompts: PositiveInt = 256
    """Number of held-out prompts over all sources, divided by weight."""
    overlong_prompts: Literal["refuse", "filter"] = "refuse"
    """For a prompt that does not fit into `model.max_sequence_length` beside the longest response: "refuse" ends the
    run, "filter" skips the problem and counts it."""
    cache_dir: Text = "runs/cache"
    """Folder for memory-mapped copies of the files, which are read once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own = [f.name for f in fields(SourceConfig) if f.name != "weight" and getattr(self, f.name)]
        require(not self.sources or not own, f"{', '.join(own)} stands beside sources; move it into one of them")
        for i, source in enumerate(self.sources):
            require(bool(source.task or source.path), f"sources.{i} has neither a task nor a path; set one")
        require(self.chat_template or not self.chat_template_args, "chat_template_args needs chat_template=true")
        given = {"messages", "add_generation_prompt"} & self.chat_template_args.keys()
        require(not given, f"chat_template_args has {', '.join(sorted(given))}, which every prompt sets; remove it")
        require(self.seed != self.eval_seed, "seed and eval_seed must differ, or evaluation is not held out")

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        if self.sources:
            return self.sources
        source = SourceConfig(**{f.name: getattr(self, f.name) for f in fields(SourceConfig)})
        return (source if source.task or source.path else replace(source, task="chain_sum"),)

    @property
    def name(self) -> str:
        """Name of all sources in messages."""
        return " + ".join(source.label for source in self.all_sources)
