"""Prompts from files: schemas, templates, order, held-out rows, mixtures, resuming, and invalid rows."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_aspo.config.data import CurriculumStage, DataConfig, SourceConfig
from megatron_aspo.data import PromptStream, files
from megatron_aspo.data.files import open_table
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.programs.verifier import CodeProblem

DAPO = [  # the schema of DAPO-Math-17k and Archer2.0
    {
        "data_source": f"math{i % 2}",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {i} + {i}?"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(2 * i), "style": "rule"},
        "extra_info": {"index": i},
    }
    for i in range(40)
]
DEEPSCALER = [{"problem": f"What is {i} + {i}?", "answer": 2 * i, "solution": f"It is {2 * i}."} for i in range(40)]


def write(path: Path, rows: Sequence[Any]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=7)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    else:
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def stream(folder: Path, max_tokens: int = 100, **fields: Any) -> PromptStream:
    fields = {"eval_prompts": 8, "cache_dir": str(folder / "cache"), **fields}
    return PromptStream(DataConfig(**fields), AsciiTokenizer(), max_tokens)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
@pytest.mark.parametrize("schema", ["dapo", "deepscaler"])
def test_public_schemas_need_no_configuration(tmp_path: Path, suffix: str, schema: str) -> None:
    rows = DAPO if schema == "dapo" else DEEPSCALER
    source = stream(tmp_path, path=write(tmp_path / f"data{suffix}", rows), prompt_template="{prompt} Box it.")
    prompts = source.draw(32)  # all that are not held out
    everything = prompts + source.held_out
    assert len({p.text for p in everything}) == len({p.id for p in everything}) == 40
    for prompt in everything:
        number = int(prompt.text.split()[-3].rstrip("?"))
        first = "Be brief.\n" if schema == "dapo" else ""
        assert prompt.text == f"{first}What is {number} + {number}? Box it."  # the last of several messages
        assert bytes(prompt.token_ids).decode() == prompt.text
        assert prompt.entry == {"answer": str(2 * number)}
        assert prompt.verifier == "math"
        assert prompt.data_source == (f"math{number % 2}" if schema == "dapo" else "")


def test_order_is_the_seeds_and_another_one_in_every_pass(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", DAPO)
    source, again, other = (stream(tmp_path, path=path, seed=seed) for seed in (0, 0, 5))
    passes = [[p.text for p in source.draw(32)] for _ in range(3)]
    assert [sorted(p) for p in passes] == [sorted(passes[0])] * 3
    assert len({tuple(p) for p in passes}) == 3
    assert [p.text for p in again.draw(96)] == [text for one in passes for text in one]
    assert [p.text for p in other.draw(32)] != passes[0]
    assert source.held_out == again.held_out == other.held_out


def test_eval_path_is_taken_in_its_own_order_and_left_out_of_training(tmp_path: Path) -> None:
    evaluation = write(tmp_path / "eval.jsonl", DEEPSCALER[:5])
    source = stream(tmp_path, path=write(tmp_path / "a.jsonl", DEEPSCALER), eval_path=evaluation)
    assert [p.text for p in source.held_out] == [row["problem"] for row in DEEPSCALER[:5]]
    assert sorted(p.text for p in source.draw(35)) == sorted(row["problem"] for row in DEEPSCALER[5:])


def test_columns_and_template(tmp_path: Path) -> None:
    rows = [{"q": {"text": f"{i}+1"}, "level": i, "final": i + 1} for i in range(20)]
    source = stream(
        tmp_path,
        path=write(tmp_path / "a.jsonl", rows),
        columns={"prompt": "q.text", "answer": "final", "data_source": "level"},
        prompt_template="Say {prompt} ({answer}?)",
        reward="json:dumps",
    )
    prompt = source.draw(1)[0]
    level = prompt.entry["level"]
    assert prompt.text == f"Say {level}+1 ({level + 1}?)"
    assert prompt.entry == {**rows[level], "answer": level + 1}  # a user-defined verifier gets the whole row
    assert prompt.data_source == str(level)
    assert prompt.verifier == "json:dumps"


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ('["34"]', ["34"]),  # Skywork-OR1's list of accepted answers
        ('["\\\\frac{1}{2}", "0.5"]', ["\\frac{1}{2}", "0.5"]),
        ("[0, 1]", "[0, 1]"),  # an interval
        ("[]", "[]"),
        ('["a", 1]', '["a", 1]'),
        ("[2, 3)", "[2, 3)"),
        (["34", 5], ["34", "5"]),
    ],
)
def test_a_list_of_accepted_answers_may_be_text(tmp_path: Path, truth: Any, answer: Any) -> None:
    row = {"prompt": "x", "reward_model": {"ground_truth": truth}}
    (prompt,) = stream(tmp_path, path=write(tmp_path / "a.jsonl", [row] * 2), eval_prompts=1).held_out
    assert prompt.entry == {"answer": answer}


def test_the_tests_of_code_may_stand_in_any_column(tmp_path: Path) -> None:
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    row = {"q": "Add one.", "hidden": {"tests": tests}, "reward_model": {"style": "rule"}, "level": 3}
    path = write(tmp_path / "a.jsonl", [row])
    columns = {"prompt": "q", "answer": "hidden.tests"}
    (prompt,) = stream(tmp_path, path=path, reward="code", columns=columns, eval_prompts=1).held_out
    assert CodeProblem.from_row(prompt.entry).tests == (("1\n", "2\n"),)
    assert prompt.entry["level"] == 3
    with pytest.raises(UserError, match=r"line 1: no tests; its columns are q, hidden.* in data\.columns\.answer"):
        stream(tmp_path, path=path, reward="code", columns=columns | {"answer": "tests"})
    with pytest.raises(UserError, match=r"line 1: reward_model\.ground_truth is missing"):
        stream(tmp_path, path=path, reward="code", columns={"prompt": "q"})


def test_what_parquet_has_and_json_has_not(tmp_path: Path) -> None:
    day, price = datetime(2024, 8, 1, 12), Decimal("1.50")
    row = {"prompt": "x", "day": day, "price": price, "tests": b"[1]"}
    path = write(tmp_path / "a.parquet", [row])
    (prompt,) = stream(tmp_path, path=path, reward="json:dumps", eval_prompts=1).held_out
    assert prompt.entry == {"prompt": "x", "day": "2024-08-01T12:00:00", "price": "1.50", "tests": "[1]"}
    path = write(tmp_path / "b.parquet", [row | {"picture": b"\xff\xd8"}])
    with pytest.raises(UserError, match=r"b\.parquet, row 1: picture cannot be kept as JSON .*remove that column"):
        stream(tmp_path, path=path, reward="json:dumps", eval_prompts=1)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file/cache cannot be used: .*; choose another"):
        stream(tmp_path / "file", path=write(tmp_path / "a.jsonl", DEEPSCALER))


def test_a_mixture_is_exact_at_any_time_and_resumes_to_the_sample(tmp_path: Path) -> None:
    sources = (
        SourceConfig(path=write(tmp_path / "a.jsonl", DEEPSCALER), weight=3, prompt_template="a {prompt}"),
        SourceConfig(path=write(tmp_path / "b.parquet", DAPO), weight=2, prompt_template="b {prompt}"),
        SourceConfig(task="chain_sum", weight=1, prompt_template="c {question}"),
    )
    whole = stream(tmp_path, 300, sources=sources, eval_prompts=12)
    assert Counter(p.verifier for p in whole.held_out) == {"math": 10, "reasoning_gym": 2}
    drawn = whole.draw(120)
    for count in (6, 30, 60, 120):
        letters = Counter(p.text.split("\n")[-1][0] if "Be brief" in p.text else p.text[0] for p in drawn[:count])
        # Skipped held-out rows count as drawn, so that shares over few prompts may be off by as many.
        assert abs(letters["c"] - count / 6) <= 1 + 12 * count / 120
    assert len({p.id for p in drawn + whole.held_out}) == 132
    part = stream(tmp_path, 300, sources=sources, eval_prompts=12)
    part.draw(47)
    resumed = stream(tmp_path, 300, sources=sources, eval_prompts=12)
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert resumed.draw(73) == drawn[47:]
    with pytest.raises(UserError, match=r"made with 3 data\.sources and there are 1 now"):
        stream(tmp_path, path=str(tmp_path / "a.jsonl")).load_state_dict(part.state_dict())


def test_a_curriculum_changes_the_task_by_position(tmp_path: Path) -> None:
    stages = tuple(
        CurriculumStage(after, {"min_terms": terms, "max_terms": terms}) for after, terms in ((10, 3), (15, 5))
    )
    source = stream(
        tmp_path,
        task="chain_sum",
        task_args={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        curriculum=stages,
        prompt_template="{expression}",
    )
    terms = [len(p.text.split()) // 2 + 1 for p in source.draw(20)]
    assert terms == [2] * 10 + [3] * 5 + [5] * 5


def test_a_table_is_read_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SourceConfig(path=write(tmp_path / "a.jsonl", [*DEEPSCALER] * 500))
    table = open_table(config, config.path, tmp_path / "cache")
    assert table.num_rows == 20_000
    before = pa.total_allocated_bytes()
    monkeypatch.setattr("megatron_aspo.data.files._convert", None)  # must not be called again
    mapped = open_table(config, config.path, tmp_path / "cache")
    assert mapped.equals(table)
    assert pa.total_allocated_bytes() - before < table.nbytes / 100
    monkeypatch.undo()
    write(tmp_path / "a.jsonl", DEEPSCALER[:3])  # another file under the same name
    assert open_table(config, config.path, tmp_path / "cache").num_rows == 3


def test_several_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "1.jsonl", DEEPSCALER[:20])
    write(folder / "2.parquet", DEEPSCALER[20:])
    (folder / "notes.txt").write_text("not data")
    for path in (str(folder), str(folder / "[12].*")):
        assert len({p.text for p in stream(tmp_path, path=path).draw(32)}) == 32


def test_a_damaged_file_of_the_cache_is_made_anew(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", DEEPSCALER)
    config = SourceConfig(path=str(tmp_path / "a.jsonl"), reward="math")
    rows = open_table(config, config.path, tmp_path / "cache")["row"].to_pylist()
    (cached,) = (tmp_path / "cache").glob("*.arrow")
    cached.write_bytes(cached.read_bytes()[:100])
    assert open_table(config, config.path, tmp_path / "cache")["row"].to_pylist() == rows


def test_hosts_that_fill_the_cache_at_once_have_whole_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks hold within a host only: both convert the files, and each waits until the other has begun. The second
    takes the file of the first, which has it mapped."""
    write(tmp_path / "a.jsonl", DEEPSCALER)
    config, both = (
        SourceConfig(path=str(tmp_path / "a.jsonl"), reward="math"),
        multiprocessing.get_context("fork").Barrier(2),
    )
    convert = files._convert

    def slow(*arguments: Any) -> None:
        both.wait(30)
        convert(*arguments)
        time.sleep(2 * (os.uname().nodename == "host1"))

    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(files, "_convert", slow)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = [pool.apply_async(rows_and_file, (f"host{i}", config, tmp_path / "cache")) for i in range(2)]
        (rows, first), (other_rows, last) = [result.get(60) for result in found]
    assert rows == other_rows == len(DEEPSCALER)
    assert first == last
    assert len(list((tmp_path / "cache").glob("*.arrow*"))) == 1


def rows_and_file(host: str, config: SourceConfig, cache: Path) -> tuple[int, int]:
    os.uname = lambda: SimpleNamespace(nodename=host)  # type: ignore[assignment, return-value]
    rows = open_table(config, config.path, cache).num_rows
    (cached,) = (file for file in cache.glob("*.arrow") if "host" not in file.name)
    return rows, cached.stat().st_ino


def test_what_a_killed_process_has_left_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", DEEPSCALER)
    config, convert = SourceConfig(path=str(tmp_path / "a.jsonl"), reward="math"), files._convert

    def killed(rows: Any, config: SourceConfig, partial: Path) -> None:
        partial.write_text("half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        open_table(config, config.path, tmp_path / "cache")
    monkeypatch.setattr(files, "_convert", convert)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert open_table(config, config.path, tmp_path / "cache").num_rows == len(DEEPSCALER)
    assert len(list((tmp_path / "cache").glob("*.arrow*"))) == 1


ROWS: list[dict[str, Any]] = [{"prompt": "x", "answer": "1"}] * 16


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (['{"problem": "x"\n'], "cannot read .*line 1: "),
        (["[1]\n"], "line 1 "),
        ([DEEPSCALER[0], {"problem": "x"}], r"line 2: .*data\.columns\.answer"),
        ([DEEPSCALER[0], {"answer": "x"}], r"line 2: .*data\.columns\.prompt"),
        ([{"problem": "", "answer": 1}], "line 1: problem"),
        ([{"problem": 5, "answer": 1}], "line 1: problem is 5"),
        ([{"prompt": [], "answer": 1}], r"line 1: prompt is \[\]"),
        ([{"prompt": [{"role": "user"}], "answer": 1}], r"line 1: prompt is \[{'role': 'user'}\], not"),
        ([{"problem": "x", "answer": {"a": 1}}], "line 1: answer is {'a': 1}"),
        ([{"problem": "x", "answer": float("nan")}], "line 1: answer is nan"),
        ([{"problem": "x", "answer": []}], "line 1: answer"),
        ([{"problem": "x", "answer": "$$"}], r"line 1: answer: answer='\$\$' is empty"),
        ([{"problem": "x", "answer": ["3", "$$"]}], "line 1: answer: answer=.* is empty"),
        ([], "no rows"),
        ([*ROWS, {"prompt": "x", "answer": None}], r"a\.parquet, row 17: no reward_model"),
        ("PAR1", r"cannot read .*a\.parquet"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, rows: list[Any] | str, named: str) -> None:
    path = str(tmp_path / ("a.parquet" if "parquet" in named else "a.jsonl"))
    if isinstance(rows, str):
        Path(path).write_text(rows)
    else:
        write(Path(path), rows)
    for _ in range(2):  # a failure is not cached
        with pytest.raises(UserError, match=named):
            stream(tmp_path, path=path)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"path": "nowhere.parquet"}, rf"data\.path=nowhere\.parquet; .*{Path(__file__).parent}"),
        ({"path": "test_data.py"}, r"data\.path: test_data\.py"),
        ({"prompt_template": "{promt}"}, r"data\.prompt_template: KeyError 'promt'; .* answer, prompt"),
        ({"columns": {"prompt": "poblem"}}, r"line 1: no poblem; .* problem, answer, solution"),
        ({"eval_prompts": 50}, r"data\.eval_prompts=50"),
        ({"max_tokens": 5}, r"5 fit .*model\.max_sequence_length, .*data\.overlong_prompts"),
        ({"max_tokens": 5, "overlong_prompts": "filter"}, r"data\.path.* none of 40 .*data\.overlong_prompts=filter"),
    ],
)
def test_refuses(tmp_path: Path, fields: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    with pytest.raises(UserError, match=named):
        stream(tmp_path, **{"path": write(tmp_path / "a.jsonl", DEEPSCALER), **fields}).draw(1)
