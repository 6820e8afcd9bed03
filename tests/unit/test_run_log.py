"""The files of a run: metrics across kills and resumes, TensorBoard, provenance, progress."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from megatron_aspo import progress as progress_module
from megatron_aspo.errors import UserError
from megatron_aspo.progress import Progress, duration
from megatron_aspo.run_log import RunLog, _git_state, read_metrics, read_samples, save_provenance


@pytest.fixture(autouse=True)
def first_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one second and process are read in the order of their numbers' digits: 10 comes before 9. A resumed run
    is another process."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def _write(run_dir: Path, resume_step: int | None, *entries: tuple[str, int, dict[str, float]]) -> None:
    log = RunLog(run_dir, resume_step)
    for phase, step, values in entries:
        log.log(step, phase, values)
    log.close()


def _entries(run_dir: Path) -> list[tuple[str, int]]:
    return [(record["phase"], record["step"]) for record in read_metrics(run_dir)]


def _scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events: Any = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def test_a_line_per_record(tmp_path: Path) -> None:
    _write(
        tmp_path,
        None,
        ("train", 1, {"loss/value": 0.5, "optimizer/grad_norm": math.inf, "rollout/rounds": 2}),
    )
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert record.pop("time") > 1.7e9
    assert record == {
        "step": 1,
        "phase": "train",
        "loss/value": 0.5,
        "optimizer/grad_norm": None,
        "rollout/rounds": 2.0,
    }
    assert _scalars(tmp_path, "loss/value") == [(1, 0.5)]


def test_lines_are_on_disk_before_close(tmp_path: Path) -> None:
    log = RunLog(tmp_path, None)
    log.log(1, "train", {"reward/mean": 0.25})
    assert read_metrics(tmp_path)[0]["reward/mean"] == 0.25
    log.close()


def test_resume_drops_what_will_be_redone(tmp_path: Path) -> None:
    warmup = [("warmup", step, {"loss/nll": float(step)}) for step in (1, 2, 3, 4)]
    train = [("train", step, {"reward/mean": step / 10}) for step in (1, 2, 3)]
    evals = [("eval", step, {"eval/accuracy": step / 10}) for step in (0, 2, 3)]
    _write(tmp_path, None, *warmup, *train, *evals)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "phase": "tra')  # the kill

    _write(tmp_path, 2, ("train", 3, {"reward/mean": 0.9}))

    kept = [("warmup", s) for s in (1, 2, 3, 4)] + [("train", 1), ("train", 2), ("eval", 0), ("eval", 2)]
    assert _entries(tmp_path) == [*kept, ("train", 3)]
    assert read_metrics(tmp_path)[-1]["reward/mean"] == 0.9
    assert _scalars(tmp_path, "reward/mean") == [(1, 0.1), (2, 0.2), (3, 0.9)]
    assert _scalars(tmp_path, "eval/accuracy") == [(0, 0.0), (2, 0.2)]
    # TensorBoard's purge would also hide warm-up steps 3 and 4.
    assert _scalars(tmp_path, "warmup/loss/nll") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert not (tmp_path / "metrics.tmp").exists()


def test_samples_are_rewound_and_set_aside_like_metrics(tmp_path: Path) -> None:
    def write(resume_step: int | None, *lines: tuple[int, float]) -> None:
        log = RunLog(tmp_path, resume_step)
        log.log_samples(
            {"step": step, "group": 0, "prompt": "é<", "responses": [{"ratio": [r, math.nan]}]} for step, r in lines
        )
        log.close()

    def steps() -> list[tuple[int, float]]:
        return [(line["step"], line["responses"][0]["ratio"][0]) for line in read_samples(tmp_path)]

    assert steps() == []
    write(None, (10, 0.5), (20, 1.0), (30, 1.5))
    (first, *_) = read_samples(tmp_path)
    assert first == {"step": 10, "group": 0, "prompt": "é<", "responses": [{"ratio": [0.5, None]}]}
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 40, "gro')  # the kill
    assert [step for step, _ in steps()] == [10, 20, 30]
    write(20, (30, 2.0))
    assert steps() == [(10, 0.5), (20, 1.0), (30, 2.0)]
    assert not (tmp_path / "samples.tmp").exists()
    write(None, (10, 3.0))
    assert steps() == [(10, 3.0)]
    assert len((tmp_path / "samples.1.jsonl").read_text().splitlines()) == 3


def test_fresh_start_sets_earlier_logs_aside(tmp_path: Path) -> None:
    for reward in (0.1, 0.2, 0.3):
        _write(tmp_path, None, ("train", 1, {"reward/mean": reward}))
    texts = [(tmp_path / f"metrics{n}.jsonl").read_text() for n in (".1", ".2", "")]
    assert [json.loads(text)["reward/mean"] for text in texts] == [0.1, 0.2, 0.3]
    assert _scalars(tmp_path, "reward/mean") == [(1, 0.3)]
    assert (tmp_path / "tensorboard.1").is_dir()


def test_resume_without_earlier_log(tmp_path: Path) -> None:
    _write(tmp_path, 5, ("train", 6, {"reward/mean": 0.5}))
    assert _entries(tmp_path) == [("train", 6)]


def test_only_the_last_line_may_be_torn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "pha\n{"step": 2, "phase": "train"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1, is damaged; delete the line"):
        read_metrics(tmp_path)


def test_read_metrics_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no metrics\.jsonl; give the folder of a run"):
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
        assert sum(line.startswith(f"{package}==") for line in first) == 1
    assert {p.name for p in tmp_path.glob("git*")} == {"git.txt", "git.1.txt"}


def test_git_state(tmp_path: Path, git_repo: Path) -> None:
    assert _git_state(tmp_path) == "not a git checkout\n"
    commit, dirty = _git_state(git_repo).splitlines()[:2]
    assert len(commit.removeprefix("commit ")) == 40
    assert dirty == "dirty no"
    (git_repo / "file").write_text("new\n")
    text = _git_state(git_repo)
    assert "\ndirty yes\n" in text
    assert "\n-old\n+new\n" in text


@pytest.fixture
def git_repo(tmp_path: Path) -> Path:
    import subprocess

    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "file").write_text("old\n")
    for command in ("init -q", "add file", "-c user.name=n -c user.email=e@x commit -qm first"):
        subprocess.run(["git", "-C", str(repo), *command.split()], check=True)
    return repo


def test_progress_in_a_log_file_is_one_line_per_update(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with Progress(Console(file=out)) as progress:
        progress.update("train", 11, 50, {"reward/mean": 0.25, "time/step": 9.5, "unknown/metric": 1.0})
        progress.update("eval", 11, 50, {"eval/accuracy": 0.5})
        progress.update("train", 13, 50, {"reward/mean": math.nan})
    lines = out.getvalue().splitlines()
    assert lines[0] == "train 11/50  reward 0.250  s/step 9.50  eta ?"
    assert lines[1] == "eval 11/50  accuracy 0.500  eta ?"
    # 37 steps left at 5 s each: the steps from before the resume do not count into the pace.
    assert lines[2:] == ["train 13/50  reward nan  eta 3 min 05 s"]


def test_progress_in_a_terminal_keeps_the_latest_values() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=100)) as progress:
        progress.update("eval", 0, 2, {"eval/accuracy": 0.125})
        progress.update("train", 1, 2, {"reward/mean": 0.25, "loss/clip_fraction_pos": 0.0123})
    last = out.getvalue().rpartition("1/2")[2]
    assert "0.125" in last
    assert "0.250" in last
    assert "1.23%" in last


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (4800, "1 h 20 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
