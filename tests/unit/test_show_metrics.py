"""The command that prints a run's metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_aspo import cli


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    records = [
        {"step": 0, "phase": "eval", "time": 1.0, "eval/accuracy": 0.25},
        {"step": 9, "phase": "train", "time": 2.0, "reward/mean": 0.123456, "loss/entropy": None, "loss/value": 2},
        {"step": 10, "phase": "train", "time": 3.0, "loss/entropy": 1e-7, "rollout/count": 16384.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.mark.parametrize(
    ("names", "printed"),
    [
        (
            ["reward/mean", "loss/*", "eval/accuracy"],
            """\
phase  step  reward/mean  loss/entropy  loss/value  eval/accuracy
 eval     0            -             -           -           0.25
train     9       0.1235          null           2              -
train    10            -         1e-07           -              -
""",
        ),
        (["loss/value"], "phase  step  loss/value\ntrain     9           2\n"),
        (["rollout/count"], "phase  step  rollout/count\ntrain    10          16384\n"),
        ([], "eval/accuracy\nloss/entropy\nloss/value\nreward/mean\nrollout/count\n"),
    ],
)
def test_a_line_a_step(run_dir: Path, capsys: pytest.CaptureFixture[str], names: list[str], printed: str) -> None:
    assert cli.main(["metrics", str(run_dir), *names]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("name", "hint"),
    [("loss/entrpy", "did you mean loss/entropy?"), ("x", "megatron-aspo metrics {} lists what it has")],
)
def test_a_name_that_it_does_not_have(run_dir: Path, capsys: pytest.CaptureFixture[str], name: str, hint: str) -> None:
    note = f"{run_dir} has logged no {name}; {hint.format(run_dir)}\n"
    assert cli.main(["metrics", str(run_dir), name]) == 2
    assert capsys.readouterr().err == f"megatron-aspo: {note}"
    assert cli.main(["metrics", str(run_dir), name, "eval/*"]) == 0  # some metrics are logged under conditions only
    printed = capsys.readouterr()
    assert printed.err == f"note: {note}"
    assert printed.out.splitlines() == ["phase  step  eval/accuracy", " eval     0           0.25"]


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["metrics", str(tmp_path)]) == 2
    assert "has no metrics.jsonl; give the folder of a run" in capsys.readouterr().err


def test_a_run_before_its_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert cli.main(["metrics", str(tmp_path)]) == 2
    assert "has logged nothing yet; wait for its first step to end" in capsys.readouterr().err
