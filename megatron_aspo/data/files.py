"""Problems from parquet and JSON files: checked row by row once, then mapped into memory."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_aspo.config_data import SourceConfig
from megatron_aspo.data.problem import Content, Problem
from megatron_aspo.errors import UserError

USUAL_COLUMNS = {
    "prompt": ("prompt", "problem", "question"),
    "answer": ("reward_model.ground_truth", "answer", "ground_truth", "final_answer", "solution"),
    "data_source": ("data_source", "source"),
}
"""Tried in this order where `columns` does not name one: the schemas of DAPO-Math-17k, DeepScaleR and Archer2.0, and of
the usual benchmarks."""

SUFFIXES = (".parquet", ".jsonl", ".json")

_FORMAT = 2
"""Part of the cache's key: to be raised when what is kept changes."""

_ROWS_PER_BATCH = 8192
_SAY_EVERY = 500_000
_Row = dict[str, Any]


class FileSource:
    """Rows of files, in an order that is shuffled anew in every pass.

    Args:
        eval_set: the rows of `eval_path` in their own order, not shuffled.

    Raises:
        UserError: no such file, not readable, or a row that does not make a problem: which, and the column at fault.
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
    """The problems of the files, a JSON text each in the column `row`, mapped into memory.

    They are read and checked when they are not in the cache yet; other processes that want them wait meanwhile.
    """
    files = find_files(pattern)
    what = [_FORMAT, sorted(config.columns.items()), config.verifier, *map(file_mark, files)]
    cached = cache_dir / f"data-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.arrow"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(cached.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not cached.exists():
                unfinished = cached.with_suffix(".tmp")
                _convert(files, config, unfinished)
                os.replace(unfinished, cached)
        return pa.ipc.open_file(pa.memory_map(str(cached))).read_all()
    except OSError as error:  # of the cache: that a file cannot be read is said where it is read
        raise UserError(f"data.cache_dir={cache_dir} cannot be used: {error}; choose another") from None


def file_mark(file: Path) -> list[str | int]:
    """By which it is told from another of its name, before or after."""
    return [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]


def find_files(pattern: str, setting: str = "data.path") -> list[Path]:
    """The files that `data.path` means, by name; `setting` is what messages call it.

    Raises:
        UserError: there are none, or of another format.
    """
    if os.path.isdir(pattern):
        files = [f for f in sorted(Path(pattern).iterdir()) if f.suffix in SUFFIXES]
    else:
        files = [Path(f) for f in sorted(glob.glob(pattern))]
    if not files:
        start = "" if os.path.isabs(pattern) else f" (from {os.getcwd()} on)"
        raise UserError(
            f"no file at {setting}={pattern}; give a {', '.join(SUFFIXES)} file, a pattern, or a folder{start}"
        )
    for file in files:
        if file.suffix not in SUFFIXES or not file.is_file():
            raise UserError(f"{setting}: {file} is not a {', '.join(SUFFIXES)} file; convert it to one of these")
    return files


def _convert(files: Sequence[Path], config: SourceConfig, path: Path) -> None:
    schema = pa.schema([("row", pa.large_string())])
    count = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        batch: list[str] = []
        for file in files:
            check = entry_check(config)
            for where, row in read_rows(file):
                batch.append(json.dumps(problem_of(row, config, where, check)))
                count += 1
                if len(batch) == _ROWS_PER_BATCH:
                    writer.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema=schema))
                    batch.clear()
                if count % _SAY_EVERY == 0:
                    print(f"{config.label}: {count:,} rows read", file=sys.stderr, flush=True)
        if batch:
            writer.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema=schema))
    if not count:
        raise UserError(f"{config.label}: {', '.join(map(str, files))} has no rows")


def read_rows(file: Path) -> Iterator[tuple[str, _Row]]:
    """(where it stands, row) of every row."""
    try:
        if file.suffix == ".parquet":
            number = 0
            for batch in pq.ParquetFile(file, memory_map=True).iter_batches(_ROWS_PER_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
            return
        with open(file, "rb") as lines:
            if file.suffix == ".json" and lines.read(64).lstrip().startswith(b"["):
                for number, row in enumerate(json.loads(file.read_bytes()), 1):
                    yield f"{file}, row {number}", row
                return
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    try:
                        yield where, json.loads(line)
                    except ValueError as error:
                        raise UserError(f"{where}: not JSON ({error}); mend or delete the line") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from None


def problem_of(row: Any, config: SourceConfig, where: str, check: Callable[[_Row], object]) -> _Row:
    """What is kept of a row. Raises UserError that names the column at fault."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a record of columns")
    content = _checked_content(*_column(row, "prompt", config, where), where)
    source = _column(row, "data_source", config, where, needed="data_source" in config.columns)[1]
    entry: _Row = {}
    if config.verifier == "math":
        column, answer = _column(row, "answer", config, where)
        entry["answer"] = _checked_answer(column, answer, where)
    else:  # the verifier may want any of the columns
        entry |= row
        column, answer = _column(row, "answer", config, where, needed="answer" in config.columns)
        if config.verifier != "code":
            entry |= {} if answer is None else {"answer": answer}
        elif "answer" in config.columns:  # the tests, which are looked for in `reward_model` first
            entry = {**entry, "reward_model": {"ground_truth": answer}}
    kept = {name: _plain(value, name, where) for name, value in entry.items()}
    try:
        check(kept)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return {"content": content, "entry": kept, "data_source": str(source or "")}


def _plain(value: Any, column: str, where: str) -> Any:
    """As JSON has it."""
    try:
        return json.loads(json.dumps(value, default=_as_text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {column} cannot be kept as JSON ({error}); remove that column") from None


def _as_text(value: Any) -> str:
    """Of the types that parquet has and JSON has not."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, date | time | Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not known there")


def _column(row: _Row, name: str, config: SourceConfig, where: str, needed: bool = True) -> tuple[str, Any]:
    """(name of the column, its value), None where there is none."""
    asked = config.columns.get(name)
    for column in (asked,) if asked else USUAL_COLUMNS[name]:
        value: Any = row
        for part in column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return column, value
    if needed:
        wanted = asked or " or ".join(USUAL_COLUMNS[name])
        raise UserError(
            f"{where}: no {wanted}; its columns are {', '.join(map(str, row))}. Name the column in data.columns.{name}"
        )
    return "", None


def _checked_content(column: str, value: Any, where: str) -> Content:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: {column} is empty")
        return value
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {column} is {_shown(value)}, neither a text nor a list of messages")
    messages: list[dict[str, str]] = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}: {column} has {_shown(message)}, which is no message with role and content")
        messages.append({"role": role, "content": content})
    return messages


def _checked_answer(column: str, value: Any, where: str) -> str | list[str]:
    value = _listed(value)
    values = value if isinstance(value, list) else [value]
    for one in values:
        is_number = isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
        if not (is_number or (isinstance(one, str) and one.strip())):
            raise UserError(f"{where}: {column} is {_shown(value)}, neither a text nor a number, nor a list of these")
    if not values:
        raise UserError(f"{where}: {column} is an empty list")
    return [str(one) for one in values] if isinstance(value, list) else str(value)


def _listed(value: Any) -> Any:
    """The list of accepted answers that Skywork-OR1 and what is made from it write as text: `["34"]`. A list of numbers
    stays text: `[0, 1]` is an interval."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        texts = json.loads(value)
    except ValueError:
        return value
    return texts if texts and all(isinstance(text, str) for text in texts) else value


def entry_check(config: SourceConfig) -> Callable[[_Row], object]:
    """What the verifier says of a row: nothing, or a ValueError."""
    if config.verifier == "code":
        code = importlib.import_module("megatron_aspo.rewards.code")
        return code.CodeProblem.from_row
    return lambda entry: None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
