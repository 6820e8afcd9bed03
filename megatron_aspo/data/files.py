"""Problems from parquet and JSON files: every row is checked once, then the problems are mapped into memory."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import batched
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, StrictStr, StringConstraints, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from megatron_aspo.config.data import SourceConfig
from megatron_aspo.data.problem import Problem
from megatron_aspo.errors import UserError
from megatron_aspo.journal.files import write_atomically
from megatron_aspo.rewards.mathematics.verifier import text_of
from megatron_aspo.rewards.programs.problems import CodeProblem

_Role = Literal["prompt", "answer", "data_source"]
USUAL_COLUMNS: dict[_Role, tuple[str, ...]] = {
    "prompt": ("prompt", "problem", "question"),
    "answer": ("reward_model.ground_truth", "answer", "ground_truth", "final_answer", "solution"),
    "data_source": ("data_source", "source"),
}
"""Columns tried in this order where `columns` names none: the schemas of DAPO-Math-17k, DeepScaleR, Archer2.0 and of
the usual benchmarks."""

SUFFIXES = (".parquet", ".jsonl", ".json")

_FORMAT = 4
"""Version of the cached rows' format, a part of the cache's key."""

_ROWS_PER_BATCH = 8192
_Row = dict[str, Any]
_Text = Annotated[StrictStr, StringConstraints(pattern=r"\S")]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Message(TypedDict):
    role: StrictStr
    content: StrictStr


_CONTENT: TypeAdapter[Any] = TypeAdapter(_Text | Annotated[list[_Message], Field(min_length=1)])
_ANSWER: TypeAdapter[Any] = TypeAdapter(_Text | _Number | Annotated[list[_Text | _Number], Field(min_length=1)])
_TEXTS: TypeAdapter[Any] = TypeAdapter(Annotated[list[StrictStr], Field(min_length=1)])


class FileSource:
    """Rows of files, shuffled anew in every pass.

    Args:
        eval_set: take the rows of `eval_path`, in their own order.

    Raises:
        UserError: a file is missing or cannot be read, or a row is not a problem.
    """

    def __init__(self, config: SourceConfig, seed: int, cache_dir: str, eval_set: bool = False) -> None:
        self._table = open_table(config, config.eval_path if eval_set else config.path, Path(cache_dir))
        self._seed = None if eval_set else seed
        self._pass = -1
        self._order = np.arange(len(self))

    def __len__(self) -> int:
        return self._table.num_rows

    def problem(self, position: int) -> Problem:
        passed, index = divmod(position, len(self))
        if self._seed is not None and passed != self._pass:
            self._order = np.random.default_rng([self._seed, passed]).permutation(len(self))
            self._pass = passed
        row: _Row = json.loads(self._table["row"][int(self._order[index])].as_py())
        content, entry = row["content"], row["entry"]
        return Problem(content, {**entry, "prompt": content}, entry, row["data_source"])


def open_table(config: SourceConfig, pattern: str, cache_dir: Path) -> pa.Table:
    """The problems of files, mapped into memory: one column `row` of JSON.

    Files that are not in the cache are read and checked. Other processes that open the same files wait for it. A
    damaged file of the cache is made anew.
    """
    files = find_files(pattern)
    key = [_FORMAT, sorted(config.columns.items()), config.verifier, *map(file_mark, files)]
    cached = cache_dir / f"data-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.arrow"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(cached.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if table := _mapped(cached):
                return table
            # Some shared file systems lock within a host only. Of hosts that write at once the first publishes: a file
            # that others have mapped must stay.
            own = cached.with_name(f"{cached.stem}-{os.uname().nodename}{cached.suffix}")
            with write_atomically(own) as partial:
                _convert(files, config, partial)
            try:
                os.link(own, cached)
            except OSError:  # there is one, perhaps damaged, or the file system has no hard links
                if _mapped(cached) is None:
                    os.replace(own, cached)
            own.unlink(missing_ok=True)
        return pa.ipc.open_file(pa.memory_map(str(cached))).read_all()
    except OSError as error:  # of the cache; `read_rows` reports those of the files
        raise UserError(f"data.cache_dir={cache_dir} cannot be used: {error}; choose another") from None


def _mapped(cached: Path) -> pa.Table | None:
    """The table in a file of the cache; None if there is none, or it is not whole."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(cached))).read_all()
    except (FileNotFoundError, pa.ArrowInvalid):
        return None


def file_mark(file: Path) -> list[str | int]:
    """Path, size and modification time, which change with the content."""
    return [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]


def find_files(pattern: str, setting: str = "data.path") -> list[Path]:
    """The files at `pattern` (a file, a pattern or a folder), sorted by name; `setting` is its name in messages.

    Raises:
        UserError: there are none, or one has another format.
    """
    formats = ", ".join(SUFFIXES)
    if os.path.isdir(pattern):
        files = [f for f in sorted(Path(pattern).iterdir()) if f.suffix in SUFFIXES]
    else:
        files = [Path(f) for f in sorted(glob.glob(pattern))]
    if not files:
        start = "" if os.path.isabs(pattern) else f" (relative to {os.getcwd()})"
        raise UserError(f"no file at {setting}={pattern}; give a {formats} file, a pattern, or a folder{start}")
    for file in files:
        if file.suffix not in SUFFIXES or not file.is_file():
            raise UserError(f"{setting}: {file} is not a {formats} file; convert it to one of these")
    return files


def _convert(files: Sequence[Path], config: SourceConfig, path: Path) -> None:
    schema = pa.schema([("row", pa.large_string())])
    problems = (json.dumps(problem_of(row, config, where)) for file in files for where, row in read_rows(file))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        rows: tuple[str, ...] = ()
        for rows in batched(problems, _ROWS_PER_BATCH):
            writer.write_batch(pa.record_batch([pa.array(rows, pa.large_string())], schema=schema))
    if not rows:
        raise UserError(f"{config.label}: {', '.join(map(str, files))} has no rows")


def read_rows(file: Path) -> Iterator[tuple[str, _Row]]:
    """(place, row) of every row of a file."""
    where = str(file)
    try:
        if file.suffix == ".parquet":
            batches = pq.ParquetFile(file, memory_map=True).iter_batches(_ROWS_PER_BATCH)
            rows: Any = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, 1))
            return
        with open(file, "rb") as lines:
            if file.suffix == ".json" and lines.read(64).lstrip().startswith(b"["):
                rows = json.loads(file.read_bytes())
                yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, 1))
                return
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                where = f"{file}, line {number}"
                if line.strip():
                    yield where, json.loads(line)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot read {where}: {' '.join(str(error).split())}; repair or remove it") from None


def problem_of(row: Any, config: SourceConfig, where: str) -> _Row:
    """The problem in a row: `content`, `entry` and `data_source`. Raises UserError that names the column at fault."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a record of columns")
    prompt, value = _column(row, "prompt", config, where)
    content = _checked(_CONTENT, value, f"{where}: {prompt}", "a text or a list of messages with role and content")
    source = _column(row, "data_source", config, where, needed="data_source" in config.columns)[1]
    entry: _Row = {} if config.verifier == "math" else dict(row)  # other verifiers get all columns
    needed = config.verifier == "math" or "answer" in config.columns
    column, answer = _column(row, "answer", config, where, needed)
    if config.verifier == "math":
        answer = _accepted(answer)
        _checked(_ANSWER, answer, f"{where}: {column}", "a text, a number or a list of these")
        try:
            for item in answer if isinstance(answer, list) else [answer]:
                text_of(item)
        except ValueError as error:
            raise UserError(f"{where}: {column}: {error}") from None
        entry["answer"] = [str(item) for item in answer] if isinstance(answer, list) else str(answer)
    elif config.verifier == "code" and "answer" in config.columns:
        entry["reward_model"] = {"ground_truth": answer}  # where CodeProblem looks for the tests first
    elif config.verifier != "code" and answer is not None:
        entry["answer"] = answer
    for name, value in entry.items():
        try:
            entry[name] = to_jsonable_python(value)
        except ValueError as error:
            raise UserError(f"{where}: {name} cannot be kept as JSON ({error}); remove that column") from None
    if config.verifier == "code":
        try:
            CodeProblem.from_row(entry)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    return {"content": content, "entry": entry, "data_source": str(source or "")}


def _column(row: _Row, role: _Role, config: SourceConfig, where: str, needed: bool = True) -> tuple[str, Any]:
    """(name of the column, its value); ("", None) if it is missing and not `needed`."""
    configured = config.columns.get(role)
    names = (configured,) if configured else USUAL_COLUMNS[role]
    for column in names:
        value: Any = row
        for part in column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return column, value
    if needed:
        raise UserError(
            f"{where}: no {' or '.join(names)}; its columns are {', '.join(map(str, row))}. Name the column in "
            f"data.columns.{role}"
        )
    return "", None


def _accepted(answer: Any) -> Any:
    """The answer, or the list of accepted answers in a text such as Skywork-OR1's `["34"]`; `[0, 1]` is an interval."""
    try:
        return _TEXTS.validate_json(answer) if isinstance(answer, str) else answer
    except ValidationError:
        return answer


def _checked(expected: TypeAdapter[Any], value: Any, where: str, name: str) -> Any:
    try:
        return expected.validate_python(value)
    except ValidationError:
        raise UserError(f"{where} is {repr(value)[:60]}, not {name}") from None
