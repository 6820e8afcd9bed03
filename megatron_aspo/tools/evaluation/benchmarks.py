"""The benchmarks: their public files, verifier, prompt template and number of samples."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_aspo.batch import Prompt
from megatron_aspo.config.data import SourceConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.files import find_files, problem_of, read_rows
from megatron_aspo.data.problem import Problem
from megatron_aspo.data.prompts import make_prompt, open_source
from megatron_aspo.errors import UserError

if TYPE_CHECKING:
    from megatron_aspo.data.tokenizer import Tokenizer

MATH_TEMPLATE = "{prompt}\n\nReason step by step, and put your final answer within \\boxed{{}}."
FUNCTION_TEMPLATE = (
    "Complete this Python function. Give the whole function, with the imports it needs, in one ```python block.\n\n"
    "```python\n{prompt}\n```"
)
PROGRAM_TEMPLATE = "Solve this problem in Python.\n\n{prompt}\n\n{task}"
READ_AND_WRITE = (
    "Give a program that reads the input from standard input and writes the answer to standard output, in one "
    "```python block."
)
COMPLETE = "Complete this code, and give all of it in one ```python block.\n\n```python\n{starter_code}\n```"

ID_COLUMNS = ("unique_id", "task_id", "question_id", "id")


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark.

    Attributes:
        data_set: its files on the Hugging Face hub, for messages.
        samples: usual number of responses per problem.
        reward: verifier (`SourceConfig.reward`).
        dates: window of `contest_date`: first date, and first date after it.
    """

    data_set: str
    samples: int
    reward: str = "math"
    template: str = MATH_TEMPLATE
    dates: tuple[str, str] | None = None


_LIVECODEBENCH = "livecodebench/code_generation_lite"
BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", 32),
    "aime25": Benchmark("math-ai/aime25", 32),
    "amc23": Benchmark("math-ai/amc23", 32),
    "math500": Benchmark("HuggingFaceH4/MATH-500", 4),
    "minerva": Benchmark("math-ai/minervamath", 8),
    "olympiadbench": Benchmark("Hothan/OlympiadBench (OE_TO_maths_en_COMP)", 4),
    # Windows and numbers of samples of ASPO's authors (github.com/wizard-III/Archer2.0).
    "livecodebench_v5": Benchmark(
        f"{_LIVECODEBENCH} (test4.jsonl to test6.jsonl)", 8, "code", PROGRAM_TEMPLATE, ("2024-08-01", "2025-02-01")
    ),
    "livecodebench_v6": Benchmark(
        f"{_LIVECODEBENCH} (test6.jsonl)", 16, "code", PROGRAM_TEMPLATE, ("2025-02-01", "2025-05-01")
    ),
    "humaneval": Benchmark("openai/openai_humaneval", 8, "code", FUNCTION_TEMPLATE),
    "reasoning_gym": Benchmark("", 8, "reasoning_gym", ""),
}


@dataclass(frozen=True)
class Selection:
    """A requested benchmark with the source of its problems.

    Attributes:
        label: name in files and messages.
        source: `path` is the file; for reasoning-gym `task` is the task.
        samples: responses per problem.
    """

    benchmark: Benchmark
    label: str
    source: SourceConfig
    samples: int

    def problems(self, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Prompt]:
        """Problem id -> prompt: all problems in their file's order; for a task, the first `data.eval_prompts` of the
        seed `data.eval_seed`.

        Raises:
            UserError: an unreadable file, a row that is no problem of the benchmark, or a prompt that is too long.
        """
        rows = list(self._task_rows(config) if self.source.task else self._file_rows())
        if not rows:
            dates = self.benchmark.dates
            window = f" with contest_date from {dates[0]} to before {dates[1]}" if dates else ""
            raise UserError(f"{self.label}: {self.source.path} has no problems{window}")
        names = _names([row for row, _ in rows])
        room = config.max_prompt_tokens
        prompts: dict[str, Prompt] = {}
        for name, (_, problem) in zip(names, rows, strict=True):
            # The engines derive a response's random numbers from its prompt's number.
            prompt = make_prompt(zlib.crc32(f"{self.label}/{name}".encode()), problem, self.source, tokenizer)
            if len(prompt.token_ids) > room:
                raise UserError(
                    f"{self.label}: the prompt of problem {name} has {len(prompt.token_ids)} tokens, {room} fit beside "
                    "the response; raise model.max_sequence_length, or lower rollout.max_response_tokens"
                )
            prompts[name] = prompt
        return prompts

    def _task_rows(self, config: RunConfig) -> Iterator[tuple[dict[str, Any], Problem]]:
        source = open_source(self.source, config.data, config.data.eval_seed)
        for number in range(config.data.eval_prompts):
            yield {}, source.problem(number)

    def _file_rows(self) -> Iterator[tuple[dict[str, Any], Problem]]:
        for file in find_files(self.source.path, self.label):
            for where, row in read_rows(file):
                if self.benchmark.dates:
                    first, end = self.benchmark.dates
                    if not first <= str(row.get("contest_date", ""))[:10] < end:
                        continue
                where = f"{where} (expected: a file of {self.benchmark.data_set})"
                kept = problem_of(_arrange(row), self.source, where)
                content, entry = kept["content"], kept["entry"]
                yield row, Problem(content, {**entry, "prompt": content}, entry, self.label)


def select(
    text: str, config: RunConfig, samples: int | None = None, template: str | None = None, greedy: bool = False
) -> Selection:
    """The selection for `--benchmark` `text`: NAME=FILE, or reasoning_gym:TASK.

    Args:
        samples, template: override the benchmark's.

    Raises:
        UserError: an unknown benchmark, or a missing file.
    """
    label, _, path = text.partition("=")
    name, _, task = label.partition(":")
    if name not in BENCHMARKS:
        raise UserError(f"--benchmark {text}: there is no {name}; known are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    count = (1 if greedy else benchmark.samples) if samples is None else samples
    if name == "reasoning_gym":
        if not task or path:
            raise UserError(f"--benchmark {text}: name a task, such as reasoning_gym:chain_sum")
        # A task that the run trains on keeps the run's settings.
        source = next((s for s in config.data.all_sources if s.task == task), SourceConfig(task=task))
        source = replace(source, prompt_template=template or source.prompt_template, weight=1.0)
        return Selection(benchmark, label, source, count)
    if task or not path:
        raise UserError(f"--benchmark {text}: write {name}=FILE, with a file of the hub's {benchmark.data_set}")
    find_files(path, f"--benchmark {name}")
    source = SourceConfig(path=path, reward=benchmark.reward, prompt_template=template or benchmark.template)
    return Selection(benchmark, label, source, count)


def _arrange(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the columns of LiveCodeBench and OlympiadBench under usual names."""
    if "question_content" in row:
        starter = row.get("starter_code")
        task = COMPLETE.format(starter_code=starter) if starter else READ_AND_WRITE
        return row | {"prompt": row["question_content"], "task": task, "contest_date": str(row.get("contest_date"))}
    if row.get("context"):
        row = row | {"question": f"{row['context']}\n\n{row['question']}"}
    if isinstance(row.get("final_answer"), list):  # all of them make the answer
        row = row | {"answer": ", ".join(str(item).strip().strip("$") for item in row["final_answer"])}
    return row


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """Ids of the rows if they are unique, numbers from 1 otherwise."""
    for column in ID_COLUMNS:
        names = [str(row[column]) for row in rows if row.get(column) is not None]
        if len(names) == len(set(names)) == len(rows):
            return names
    return [str(number) for number in range(1, len(rows) + 1)]
