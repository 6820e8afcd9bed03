"""The report of several runs: its tables against hand-computed numbers, its names and colours, and what it refuses."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_aspo import cli
from megatron_aspo.errors import UserError
from megatron_aspo.report import figure, print_summary, write_report
from megatron_aspo.report.runs import COLOURS, difference, letter, load_runs
from megatron_aspo.report.tables import comparison_rows, config_differences


def save(folder: Path, steps: int = 20, reward: float = 0.01, accuracy: dict[int, float] | None = None) -> Path:
    """A run whose reward is `reward` times the step."""
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = [
        {"step": s, "phase": "train", "time": 0.0, "reward/mean": reward * s, "reward/standard_error": 0.1}
        | {"loss/ratio_pos": 1.1, "loss/ratio_neg": 0.9, "optimizer/grad_norm_max": float(s), "time/step": 2.0}
        for s in range(1, steps + 1)
    ]
    records += [
        {"step": s, "phase": "eval", "time": 0.0, "eval/accuracy": value, "eval/count": 100}
        for s, value in (accuracy or {}).items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_rows_of_results(tmp_path: Path) -> None:
    one = save(tmp_path / "one", accuracy={0: 0.25, 20: 0.5})
    two = save(tmp_path / "two", steps=10, reward=0.02, accuracy={0: 0.25, 5: 0.75, 10: 0.6})  # not at its end yet
    three = save(tmp_path / "three")  # never evaluated
    assert comparison_rows(load_runs([one, two, three])) == [
        ("Held-out accuracy, last", ["50.0% [40.4%, 59.6%] at step 20", "60.0% [50.2%, 69.1%] at step 10", "–"]),
        ("Difference from A", ["–", "+10.0 points [−3.7, +23.2]", "–"]),
        ("Held-out accuracy, best", ["50.0% [40.4%, 59.6%] at step 20", "75.0% [65.7%, 82.5%] at step 5", "–"]),
        ("Training reward", ["0.195", "0.200", "0.195"]),
        ("Mean ratio, A > 0", ["1.1000"] * 3),
        ("Mean ratio, A < 0", ["0.9000"] * 3),
        ("Largest gradient norm", ["20", "10", "20"]),
        ("Train steps", ["20", "10", "20"]),
        ("Time in train steps", ["40 s, median 2.00 s", "20 s, median 2.00 s", "40 s, median 2.00 s"]),
    ]


def test_interval_of_a_difference() -> None:
    # Newcombe, Stat. Med. 17 (1998) 873, table II: 56/70 - 48/80 gives 0.0524 to 0.3339 by method 10.
    assert difference((48 / 80, 80), (56 / 70, 70)) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_settings_that_differ(tmp_path: Path) -> None:
    one, two, three = (save(tmp_path / name) for name in ("one", "two", "three"))
    (one / "config.yaml").write_text(
        "name: one\nseed: 1\nloss: {objective: aspo, dual_clip: 3.0}\ntrain: {steps: 20}\n"
    )
    (two / "config.yaml").write_text("name: two\nseed: true\nloss: {objective: grpo, dual_clip: null}\nnew: [1, x]\n")
    assert config_differences(load_runs([one, two])) == [
        ("seed", ["1", "true"]),
        ("loss.objective", ["aspo", "grpo"]),
        ("loss.dual_clip", ["3.0", "null"]),
        ("train.steps", ["20", "–"]),
        ("new", ["–", '[1, "x"]']),
    ]
    page = write_report([one, three], tmp_path / "out")[1].read_text()
    assert "<tr><th>loss.dual_clip</th><td>3.0</td><td>–</td></tr>" in page
    same = write_report([three, save(tmp_path / "four")], tmp_path / "out")[1].read_text()
    assert "the configurations are the same, or were not kept" in same


def test_a_run_has_one_colour_and_letter_everywhere(tmp_path: Path) -> None:
    runs = [save(tmp_path / name, steps) for name, steps in (("one", 30), ("<two>", 12), ("three", 3))]
    png, page = write_report(runs, tmp_path / "a" / "new" / "folder")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert page.parent == tmp_path / "a" / "new" / "folder"
    assert not re.search(r"https?:|<two>|<link|<img", text)
    plots = dict(re.findall(r'<figure><svg role="img" aria-label="([^"]+)"(.*?)</svg>', text, re.S))
    assert list(plots) == [
        "Reward: mean, 95% band",
        "Mean importance ratio: A &gt; 0",
        "Mean importance ratio: A &lt; 0",
        "Gradient norm, unclipped: largest",
        "Time per step",
    ]
    for plot in plots.values():
        for i, name in enumerate("ABC"):
            assert re.search(rf"fill: {COLOURS[i]}[^>]*>{name}</text>", plot), name
            assert f"stroke: {COLOURS[i]}" in plot
    assert len(set(COLOURS)) == 6
    for i, name in enumerate(("one", "&lt;two&gt;", "three")):
        assert re.search(rf'stroke="{COLOURS[i]}"[^>]*/></svg><b>{"ABC"[i]}</b> {name}</span>', text)


def test_letters_do_not_cover_each_other(tmp_path: Path) -> None:
    runs = load_runs([save(tmp_path / str(i), reward=0.01 + 1e-6 * i) for i in range(8)])
    reward = figure.make_plots(runs)[0]
    places = re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>([A-H])</text>', figure.svg(reward))
    assert sorted(name for _, name in places) == list("ABCDEFGH")
    heights = sorted(float(y) for y, _ in places)
    assert min(b - a for a, b in pairwise(heights)) > 7  # points, of a font of 9


def test_a_long_run_makes_no_large_plot_and_loses_no_spike(tmp_path: Path) -> None:
    long = save(tmp_path / "long", steps=20_000, reward=0.0)
    lines = [json.loads(line) for line in (long / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["reward/mean"] = (i % 7) / 100 + (5 if i == 12_345 else 0)
    (long / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = load_runs([long, save(tmp_path / "short", steps=30)])
    drawn = Figure().subplots()
    figure.make_plots(runs)[0].draw(drawn)
    thin, thick, *_ = drawn.lines
    assert max(np.asarray(thin.get_ydata())) == pytest.approx(5.04, abs=0.03)
    assert len(np.asarray(thin.get_xdata())) <= figure.POINTS >= len(np.asarray(thick.get_xdata()))
    assert np.asarray(thick.get_xdata())[-1] == 20_000
    assert len(figure.svg(figure.make_plots(runs)[0])) < 80_000


def test_letters_and_looks_of_many_runs(tmp_path: Path) -> None:
    assert [letter(i) for i in (0, 25, 26, 51, 52, 701, 702)] == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]
    runs = load_runs([save(tmp_path / str(i), steps=1) for i in range(24)])
    assert len({(run.colour, run.dashes) for run in runs}) == 24


def test_folders_of_one_name_are_told_by_their_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [save(tmp_path / "a" / "run"), save(tmp_path / "b" / "run"), save(tmp_path / "other")]
    assert [run.label for run in load_runs(runs)] == [str(runs[0]), str(runs[1]), "other"]
    print_summary(runs[1:])
    assert re.search(r"Training reward\s*│ 0\.195\s*│ 0\.195", capsys.readouterr().out)


def test_where_the_report_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = save(tmp_path / "one", steps=1), save(tmp_path / "two", steps=1)
    monkeypatch.chdir(tmp_path)
    assert write_report([one])[1] == one / "report.html"
    assert write_report([one, two])[1] == Path("report/report.html")
    assert write_report([one], Path("x"))[0] == Path("x/report.png")


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = save(tmp_path / "one"), save(tmp_path / "two")
    unlike, early, damaged = (save(tmp_path / name) for name in ("unlike", "early", "damaged"))
    (unlike / "metrics.jsonl").write_text('{"step": 1, "phase": "train", "time": 0, "loss/kl": 1}\n')
    (early / "metrics.jsonl").write_text('{"step": 0, "phase": "eval", "time": 0, "eval/accuracy": 1}\n')
    (damaged / "config.yaml").write_text("a: [")
    (tmp_path / "file").touch()
    for argv, message in (
        ([one, tmp_path / "none"], f"{tmp_path}/none has no metrics.jsonl; give the folder of a run"),
        ([one, tmp_path / "two" / ".." / "one"], f"{tmp_path}/two/../one is given twice; name every run once"),
        ([one, unlike], f"{one} and {unlike} have no metric in common, so there is nothing to compare"),
        ([one, early], f"{early} has no train step yet; wait for its first one to end"),
        ([one, damaged], f"{damaged}/config.yaml is damaged; delete it"),
        ([one, two, "--out", tmp_path / "file"], f"cannot write the report into {tmp_path}/file: File exists; name"),
    ):
        assert cli.main(["report", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"megatron-aspo: {message}")
        assert err.count("\n") == 1
    with pytest.raises(UserError, match="given twice"):
        load_runs([one, one])
