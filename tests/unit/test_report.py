"""The report of one or several runs: its numbers against hand-computed ones, its page against a browser's
requirements."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_aspo import cli
from megatron_aspo.tools.report import figure, write_report
from megatron_aspo.tools.report.panels import PANELS
from megatron_aspo.tools.report.runs import Run, load_runs
from megatron_aspo.tools.report.tables import config_differences, result_rows

Record = dict[str, Any]


def train_record(step: int, **values: float | None) -> Record:
    return {"step": step, "phase": "train", "time": 0.0} | {k.replace("__", "/"): v for k, v in values.items()}


def eval_record(step: int, accuracy: float, count: int | None = None) -> Record:
    record = {"step": step, "phase": "eval", "time": 0.0, "eval/accuracy": accuracy}
    return record if count is None else record | {"eval/count": count}


def save(folder: Path, *records: Record) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def save_growing(folder: Path, steps: int = 20, reward: float = 0.01, accuracy: dict[int, float] | None = None) -> Path:
    """Save a run whose reward is `reward` times the step."""
    trains = [
        train_record(s, reward__mean=reward * s, loss__ratio_pos=1.1, loss__ratio_neg=0.9, time__step=2.0)
        for s in range(1, steps + 1)
    ]
    return save(folder, *trains, *(eval_record(s, value, 100) for s, value in (accuracy or {}).items()))


def make_run(*records: Record) -> Run:
    return Run(Path("a"), "a", "#000000", "solid", list(records), {})


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    """A run of 30 steps with every metric of the panels, and with evaluations that have counts."""
    trains = [
        train_record(step)
        | {key: 0.5 + step / 100 for panel in PANELS if panel.phase == "train" for key in panel.lines.values()}
        for step in range(1, 31)
    ]
    warmups = [{"step": s, "phase": "warmup", "time": 0.0, "loss/nll": 3 / s, "eval/accuracy": 0.1} for s in (1, 2)]
    (tmp_path / "config.yaml").write_text("name: <demo>\nloss:\n  objective: aspo\n")
    (tmp_path / "git.txt").write_text("commit 0123abc\ndirty no\n\n")
    return save(tmp_path, *warmups, eval_record(0, 0.0, 64), *trains, eval_record(30, 1.0, 64))


def test_results_of_a_run() -> None:
    records = [
        eval_record(0, 0.25, 100),
        *(
            train_record(s, reward__mean=s / 100, optimizer__grad_norm=None if s == 3 else 2.0, time__step=s)
            for s in range(1, 21)
        ),
        eval_record(10, 0.75, 100),
        eval_record(20, 0.5),
    ]
    assert result_rows([make_run(*records)]) == {
        "Held-out accuracy": ["25.0% [17.5%, 34.4%] at step 0 → 50.0% at step 20"],
        "Training reward": ["0.015 → 0.195"],  # means of steps 1, 2 and of 19, 20
        "Gradient norm": ["2 → 2"],
        "Train steps": ["20"],
        "Time in train steps": ["3 min 30 s, median 10.50 s"],
    }
    assert result_rows([make_run(train_record(1, reward__mean=0.5), eval_record(1, 0.25))]) == {
        "Held-out accuracy": ["25.0% at step 1"],
        "Training reward": ["0.500"],
        "Train steps": ["1"],
    }


def test_results_of_several_runs(tmp_path: Path) -> None:
    one = save_growing(tmp_path / "one", accuracy={0: 0.25, 20: 0.5})
    two = save_growing(tmp_path / "two", steps=10, reward=0.02, accuracy={0: 0.25, 5: 0.75, 10: 0.6})  # unfinished
    three = save_growing(tmp_path / "three")  # never evaluated
    first = "25.0% [17.5%, 34.4%] at step 0"
    assert result_rows(load_runs([one, two, three])) == {
        "Held-out accuracy": [
            f"{first} → 50.0% [40.4%, 59.6%] at step 20",
            f"{first} → 60.0% [50.2%, 69.1%] at step 10",
            "–",
        ],
        "Difference from one, last accuracy": ["–", "+10.0 points [−3.7, +23.2]", "–"],
        "Training reward": ["0.015 → 0.195", "0.020 → 0.200", "0.015 → 0.195"],
        "Mean ratio, A > 0": ["1.1000 → 1.1000"] * 3,
        "Mean ratio, A < 0": ["0.9000 → 0.9000"] * 3,
        "Train steps": ["20", "10", "20"],
        "Time in train steps": ["40 s, median 2.00 s", "20 s, median 2.00 s", "40 s, median 2.00 s"],
    }


def test_a_step_done_again_counts_once() -> None:
    records = [train_record(1, a=1.0), train_record(2, a=2.0), train_record(2, a=5.0), train_record(3, b=1.0)]
    assert make_run(*records).series("train", "a") == {1: 1.0, 2: 5.0}


def test_settings_that_differ(tmp_path: Path) -> None:
    one, two = (save_growing(tmp_path / name) for name in ("one", "two"))
    (one / "config.yaml").write_text(
        "name: one\nseed: 1\nloss: {objective: aspo, dual_clip: 3.0}\ntrain: {steps: 20}\n"
    )
    (two / "config.yaml").write_text("name: two\nseed: true\nloss: {objective: grpo, dual_clip: null}\nnew: [1, x]\n")
    assert config_differences(load_runs([one, two])) == {
        "seed": ["1", "true"],
        "loss.objective": ["aspo", "grpo"],
        "loss.dual_clip": ["3.0", "null"],
        "train.steps": ["20", "–"],
        "new": ["–", '[1, "x"]'],
    }
    page = write_report([one, two], tmp_path / "out").read_text()
    assert "<tr><th>loss.dual_clip</th><td>3.0</td><td>null</td></tr>" in page


def test_the_page_stands_alone(full_run: Path) -> None:
    path = write_report([full_run])
    assert path == full_run / "report.html"
    markup = path.read_text()
    assert len(re.findall(r'<figure role="img" aria-label="[^"]+"><svg viewBox=', markup)) == len(PANELS)
    assert not re.search(r"https?:|<script|<link|@import|<img", markup)
    assert not re.search(r"#010203|#040506|#ffffff", markup.partition("<body>")[2])  # the colours are the page's
    ids = re.findall(r'\bid="([^"]+)"', markup)
    assert len(ids) == len(set(ids)) > 20
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', markup)) <= set(ids)
    for name, fact in (
        ("Code", "commit 0123abc, dirty no"),
        ("Held-out accuracy", "0.0% [0.0%, 6.8%] at step 0 → 100.0% [93.2%, 100.0%] at step 30"),
    ):
        assert f"<tr><th>{name}</th><td>{fact}</td></tr>" in markup
    assert "name: &lt;demo&gt;" in markup


def test_a_run_has_one_look_everywhere(tmp_path: Path) -> None:
    folders = [save_growing(tmp_path / name, steps) for name, steps in (("one", 30), ("<two>", 12), ("three", 3))]
    page = write_report(folders, tmp_path / "a" / "new" / "folder")
    assert page.parent == tmp_path / "a" / "new" / "folder"
    text = page.read_text()
    assert "<two>" not in text
    plots = re.findall(r"<figure.*?</figure>", text, re.S)
    assert len(plots) == 4
    for run in load_runs(folders):
        assert all(f"stroke: {run.colour}" in plot for plot in plots)
        assert f'3px solid {run.colour}"></span>{html.escape(run.label)}</span>' in text


@pytest.mark.parametrize(
    ("records", "panels"),
    [
        ([train_record(1, unknown__metric=0.5)], 0),
        ([train_record(1, reward__mean=0.5)], 1),
        ([train_record(1, reward__mean=0.5, loss__kl=None)], 1),  # never finite: nothing to draw
        ([train_record(1, loss__log_ratio_max_first=0.0), train_record(2, loss__log_ratio_max_first=1e-6)], 1),
        (
            [train_record(s, reward__mean=s if s % 3 else None) for s in range(1, 40)]
            + [eval_record(9, 0.5), eval_record(10, 1.0)],
            2,
        ),
        ([train_record(1, time__rollout=1.0, loss__kl=0.1)], 2),
    ],
    ids=["nothing known", "one point", "no value", "zero on a log scale", "gaps and no counts", "no total time"],
)
def test_missing_parts_are_left_out(tmp_path: Path, records: list[Record], panels: int) -> None:
    page = write_report([save(tmp_path, *records)]).read_text()
    assert page.count("<figure ") == panels


def test_gaps_do_not_reach_the_smooth_line() -> None:
    assert figure._smooth(np.array([1.0, np.nan] * 20)).tolist() == pytest.approx([1.0] * 40)


def test_a_long_run_makes_no_large_plot_and_loses_no_spike(tmp_path: Path) -> None:
    records = [train_record(i + 1, reward__mean=(i % 7) / 100 + (5 if i == 12_345 else 0)) for i in range(20_000)]
    runs = load_runs([save(tmp_path / "long", *records), save_growing(tmp_path / "short", steps=30)])
    plots = figure.make_plots(runs)
    assert len(plots["Reward: mean"]) < 80_000
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", plots["Reward: mean"].split("step</text>")[-1])]
    assert min(heights) < 40  # the spike reaches the top of 198 points


def test_names_and_looks_of_many_runs(tmp_path: Path) -> None:
    runs = load_runs([save_growing(tmp_path / str(i), steps=1) for i in range(18)])
    assert len({(run.colour, run.style) for run in runs}) == 18
    same = [save_growing(tmp_path / "a" / "run"), save_growing(tmp_path / "b" / "run")]
    assert [run.label for run in load_runs([*same, tmp_path / "0"])] == [str(same[0]), str(same[1]), "0"]


def test_where_the_report_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = save_growing(tmp_path / "one", steps=1), save_growing(tmp_path / "two", steps=1)
    monkeypatch.chdir(tmp_path)
    for arguments, path in (([one], one), ([one, two], Path("report")), ([one, "--out", "x"], Path("x"))):
        assert cli.main(["report", *map(str, arguments)]) == 0
        assert capsys.readouterr().out == f"{path / 'report.html'}\n"
        assert (path / "report.html").is_file()


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = save_growing(tmp_path / "one")
    early = save(tmp_path / "early", eval_record(0, 1))
    (tmp_path / "file").touch()
    for argv, named in (
        ([one, tmp_path / "none"], f"{tmp_path}/none"),
        ([one, early], f"{early}"),
        ([one, "--out", tmp_path / "file"], "--out"),
    ):
        assert cli.main(["report", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert named in err
        assert err.count("\n") == 1


def test_import_is_light() -> None:
    heavy = "import sys, megatron_aspo.tools.report; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
