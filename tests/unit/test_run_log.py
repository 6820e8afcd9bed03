"""The files of a run: metrics across kills and resumes, samples, provenance, and the printed line."""

import importlib.metadata
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.journal.journal import Journal
from megatron_aspo.journal.log import _git_state, read_metrics, read_samples, save_provenance
from megatron_aspo.journal.progress import duration, progress_line

RESPONSE = ("text", "score", "reward", "advantage", "finish_reason")


@pytest.fixture(autouse=True)
def first_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restart TensorBoard's file counter, as in the new process of a resumed run. Files of one second and process
    are sorted as text: 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def journal_of(run_dir: Path, resume_step: int | None, is_rank_0: bool = True) -> Journal:
    config = RunConfig(name=run_dir.name, output_dir=str(run_dir.parent))
    return Journal(config, ["train"], resume_step, is_rank_0)


def write(run_dir: Path, resume_step: int | None, *entries: tuple[str, int, dict[str, float]]) -> None:
    with journal_of(run_dir, resume_step) as journal:
        for phase, step, values in entries:
            journal.record(phase, step, 5, values)


def entries_of(run_dir: Path) -> list[tuple[str, int]]:
    return [(record["phase"], record["step"]) for record in read_metrics(run_dir)]


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events: Any = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def test_a_line_per_record(tmp_path: Path) -> None:
    with journal_of(tmp_path, None) as journal:
        journal.record("train", 1, 5, {"loss/value": 0.5, "optimizer/grad_norm": math.inf, "rollout/rounds": 2})
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # on disk at once
    record = json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert record.pop("time") > 1.7e9
    metrics = {"loss/value": 0.5, "optimizer/grad_norm": None, "rollout/rounds": 2.0}
    assert record == {"step": 1, "phase": "train", **metrics}
    assert scalars(tmp_path, "loss/value") == [(1, 0.5)]


def test_resume_drops_what_will_be_redone(tmp_path: Path) -> None:
    warmup = [("warmup", step, {"loss/nll": float(step)}) for step in (1, 2, 3, 4)]
    train = [("train", step, {"reward/mean": step / 10}) for step in (1, 2, 3)]
    evals = [("eval", step, {"eval/accuracy": step / 10}) for step in (0, 2, 3)]
    write(tmp_path, None, *warmup, *train, *evals)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "phase": "tra')  # the kill

    write(tmp_path, 2, ("train", 3, {"reward/mean": 0.9}))

    kept = [("warmup", s) for s in (1, 2, 3, 4)] + [("train", 1), ("train", 2), ("eval", 0), ("eval", 2)]
    assert entries_of(tmp_path) == [*kept, ("train", 3)]
    assert read_metrics(tmp_path)[-1]["reward/mean"] == 0.9
    assert scalars(tmp_path, "reward/mean") == [(1, 0.1), (2, 0.2), (3, 0.9)]
    assert scalars(tmp_path, "eval/accuracy") == [(0, 0.0), (2, 0.2)]
    with pytest.raises(KeyError):  # the warm-up counts its own steps
        scalars(tmp_path, "loss/nll")


def test_samples_are_rewound_and_set_aside_like_metrics(tmp_path: Path) -> None:
    def write_samples(resume_step: int | None, *lines: tuple[int, float]) -> None:
        with journal_of(tmp_path, resume_step) as journal:
            for step, r in lines:
                response = {**dict.fromkeys(RESPONSE, ""), "ratio": [r, math.nan]}
                journal.record_samples(step, [{"step": step, "group": 0, "prompt": "é<", "responses": [response]}])

    def steps() -> list[tuple[int, float]]:
        return [(line["step"], line["responses"][0]["ratio"][0]) for line in read_samples(tmp_path)]

    assert steps() == []
    write_samples(None, (10, 0.5), (20, 1.0), (30, 1.5))
    (first, *_) = read_samples(tmp_path)
    assert first == {
        "step": 10,
        "group": 0,
        "prompt": "é<",
        "responses": [dict.fromkeys(RESPONSE, "") | {"ratio": [0.5, None]}],
    }
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write('{"step": 40, "prompt": "é'.encode()[:-1])  # the kill, within a character
    assert [step for step, _ in steps()] == [10, 20, 30]
    write_samples(20, (30, 2.0))
    assert steps() == [(10, 0.5), (20, 1.0), (30, 2.0)]
    write_samples(None, (10, 3.0))
    assert steps() == [(10, 3.0)]
    assert len((tmp_path / "samples.1.jsonl").read_text().splitlines()) == 3


def test_fresh_start_sets_earlier_logs_aside(tmp_path: Path) -> None:
    for reward in (0.1, 0.2, 0.3):
        write(tmp_path, None, ("train", 1, {"reward/mean": reward}))
    texts = [(tmp_path / f"metrics{n}.jsonl").read_text() for n in (".1", ".2", "")]
    assert [json.loads(text)["reward/mean"] for text in texts] == [0.1, 0.2, 0.3]
    assert scalars(tmp_path, "reward/mean") == [(1, 0.3)]
    assert (tmp_path / "tensorboard.1").is_dir()


def test_no_metrics_or_damaged_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "pha\n{"step": 2, "phase": "train"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1"):
        read_metrics(tmp_path)


def test_provenance_keeps_every_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    save_provenance(tmp_path, "seed: 1\n", ["megatron-aspo", "train", "my run.yaml"])
    save_provenance(tmp_path, "seed: 2\n", ["megatron-aspo", "train"])
    assert (tmp_path / "config.1.yaml").read_text() == "seed: 1\n"
    assert (tmp_path / "config.yaml").read_text() == "seed: 2\n"
    first = (tmp_path / "environment.1.txt").read_text().splitlines()
    assert first[0] == "command: megatron-aspo train 'my run.yaml'"
    assert "ranks: 4" in first
    for package in ("torch", "numpy", "megatron-core", "reasoning-gym"):
        found = [line for line in first if line.startswith(f"{package}==")]
        assert found == [f"{package}=={importlib.metadata.version(package)}"]
    assert {p.name for p in tmp_path.glob("git*")} == {"git.txt", "git.1.txt"}


def test_git_state(tmp_path: Path) -> None:
    assert _git_state(tmp_path) == "not a git checkout\n"
    (tmp_path / "file").write_text("old\n")
    for command in ("init -q", "add file", "-c user.name=n -c user.email=e@x commit -qm first"):
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
    commit, dirty = _git_state(tmp_path).splitlines()[:2]
    assert len(commit.removeprefix("commit ")) == 40
    assert dirty == "dirty no"
    (tmp_path / "file").write_text("new\n")
    text = _git_state(tmp_path)
    assert "\ndirty yes\n" in text
    assert "\n-old\n+new\n" in text


def test_the_printed_line() -> None:
    line = progress_line("train", 11, 31, {"reward/mean": 0.25, "time/step": 9.25, "unknown/metric": 1.0})
    assert line == "train 11/31  reward 0.250  s/step 9.25  eta 3 min 05 s"
    assert [duration(seconds) for seconds in (0.4, 59.6, 4800)] == ["0 s", "1 min 00 s", "1 h 20 min"]
