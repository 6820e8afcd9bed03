"""A newcomer's own problems: the file and the YAML in docs/quick-start.md run as they stand there, and learn."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_aspo.run_log import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## Your own problems\n")[2].partition("\n## ")[0]
FILES = dict(re.findall(r'^```\w+ title="([\w.]+)"\n(.*?)^```$', SECTION, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the page's files and what the first of them writes."""
    folder = tmp_path_factory.mktemp("first")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, "make_problems.py"], cwd=folder, check=True)
    return folder


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    # The package of this checkout, wherever another one may be installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [Path(sys.executable).with_name("megatron-aspo"), "train", "mine.yaml", *overrides]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


def test_ten_lines_are_enough(folder: Path) -> None:
    assert sorted(FILES) == ["make_problems.py", "mine.yaml"]
    lines = [line for line in FILES["mine.yaml"].splitlines() if line]
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 80
    assert len(yaml.safe_load(FILES["mine.yaml"])) == len(lines)  # a section each, none folded into another
    problems = [json.loads(line) for line in (folder / "my_problems.jsonl").read_text().splitlines()]
    done = train(folder)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(folder / "runs" / "mine")
    accuracy = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    assert accuracy[-1] > accuracy[0] + 0.05  # 0.17 to 0.33 when the page was written
    groups = [json.loads(line) for line in (folder / "runs" / "mine" / "samples.jsonl").read_text().splitlines()]
    answers = {problem["problem"]: problem["answer"] for problem in problems}
    assert {group["prompt"] for group in groups} <= set(answers)


def test_what_goes_wrong_is_one_line(folder: Path) -> None:
    done = train(folder, "data.columns.answer=result", "name=wrong")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("megatron-aspo: starting ")]
    assert line == (
        "megatron-aspo: my_problems.jsonl, line 1: no result; its columns are problem, answer. "
        "Name the column in data.columns.answer"
    )
