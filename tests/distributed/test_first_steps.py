"""Training on a user's own problems: the file and YAML of docs/quick-start.md run as printed, and the policy learns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_aspo.journal.log import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## Your own problems\n")[2].partition("\n## ")[0]
FILES = dict(re.findall(r'^```\w+ title="([\w.]+)"\n(.*?)^```$', SECTION, re.MULTILINE | re.DOTALL))


def test_ten_lines_are_enough(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, "make_problems.py"], cwd=tmp_path, check=True)
    assert sorted(FILES) == ["make_problems.py", "sums.yaml"]
    lines = [line for line in FILES["sums.yaml"].splitlines() if line]
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 80
    assert len(yaml.safe_load(FILES["sums.yaml"])) == len(lines)  # one section each, none nested in another
    problems = [json.loads(line) for line in (tmp_path / "my_problems.jsonl").read_text().splitlines()]
    # Uses the package of this checkout, even if another version is installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [Path(sys.executable).with_name("megatron-aspo"), "train", "sums.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "runs" / "sums")
    accuracy = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    assert accuracy[-1] > accuracy[0] + 0.05  # 0.17 to 0.33 when the page was written
    groups = [json.loads(line) for line in (tmp_path / "runs" / "sums" / "samples.jsonl").read_text().splitlines()]
    answers = {problem["problem"]: problem["answer"] for problem in problems}
    assert {group["prompt"] for group in groups} <= set(answers)
