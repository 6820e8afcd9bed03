"""The sample browser's data: selection from samples.jsonl, and escaping of responses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_aspo.errors import UserError
from megatron_aspo.tools.report import samples, write_report
from megatron_aspo.tools.report.runs import Run, load_runs
from megatron_aspo.tools.report.samples import load_samples

NASTY = "</script><script>alert(1)</script><!--<script> &amp; \u2028 ' \" \\ \ud800"


def response(tokens: list[str], advantage: float = 1.0) -> dict[str, Any]:
    size = len(tokens)
    return {
        "text": "".join(tokens),
        "score": 1.0,
        "reward": 0.5,
        "advantage": advantage,
        "finish_reason": "stop",
        "versions": [[4, size]],
        "tokens": tokens,
        "logprob": [-0.123456] * size,
        "ratio": [0.8] * size,
        "weight": [1.25] * (size - 1) + [None],
        "entropy": [0.0] * size,
        "hard_clipped": [0, size - 1],
        "soft_clipped": [1],
    }


def group(step: int, number: int = 0, tokens: int = 3, count: int = 2) -> dict[str, Any]:
    answers = [response(["x"] * tokens) for _ in range(count)]
    return {"step": step, "group": number, "prompt": "1 + 1 =", "responses": answers}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "phase": "train", "time": 0, "reward/mean": 1}\n')
    (tmp_path / "config.yaml").write_text("loss: {objective: aspo}\n")
    return tmp_path


def save(folder: Path, *groups: dict[str, Any]) -> Run:
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in groups))
    return load_runs([folder])[0]


def scripts(page: str) -> list[str]:
    """The content of a page's scripts. As in a browser, the first end tag ends a script."""
    return re.findall(r"<script[^>]*>(.*?)</script", page, re.DOTALL)


def test_nothing_in_a_sample_breaks_out(folder: Path) -> None:
    one = group(10) | {"prompt": NASTY}
    one["responses"] = [response(["a", NASTY, "</noscript>"])]
    save(folder, one)
    (folder / "config.yaml").write_text("loss: {objective: '</script><b>'}\n")
    page = write_report([folder]).read_text()
    data, script = scripts(page)
    assert "alert" not in script
    assert "<" not in data
    (run,) = json.loads(data)
    assert run["objective"] == "</script><b>"
    (shown,) = run["groups"]
    assert shown["prompt"] == NASTY
    assert shown["responses"][0]["tokens"] == ["a", NASTY, "</noscript>"]
    assert "<b>" not in page


def test_the_layout_of_the_data(folder: Path) -> None:
    shown = load_samples(save(folder, group(10, 4)), 10_000)
    expected = {
        "score": 1.0,
        "reward": 0.5,
        "advantage": 1.0,
        "finish": "stop",
        "versions": [[4, 3]],
        "length": 3,
        "tokens": ["x"] * 3,
        "ratio": [0.8] * 3,
        "weight": [1.25, 1.25, None],
        "logprob": [-0.1235] * 3,
        "entropy": [0.0] * 3,
        "hard": [0, 2],
        "soft": [1],
    }
    one = {"step": 10, "group": 4, "prompt": "1 + 1 =", "responses": [expected] * 2}
    assert shown == {"label": folder.name, "objective": "aspo", "steps": "1 of 1", "groups": [one]}


def test_turns_of_the_environment_keep_their_places(folder: Path) -> None:
    one = group(10)
    played = response(["a", "b", "c", "d"]) | {"versions": [[4, 1], [-1, 2], [4, 1]]}
    one["responses"] = [played | {name: [0.8, None, None, 0.8] for name in ("ratio", "weight", "logprob", "entropy")}]
    (shown,) = load_samples(save(folder, one), 10_000)["groups"][0]["responses"]
    assert shown["versions"] == [[4, 1], [-1, 2], [4, 1]]
    assert shown["tokens"] == ["a", "b", "c", "d"]
    assert shown["ratio"] == shown["entropy"] == [0.8, None, None, 0.8]


def test_a_long_run_is_thinned(folder: Path) -> None:
    run = save(folder, *(group(step, number) for step in range(10, 1010, 10) for number in (0, 1)))
    size = len(json.dumps(load_samples(run, 1 << 20)["groups"][0]))
    shown = load_samples(run, 41 * size)
    steps = [one["step"] for one in shown["groups"]]
    assert steps == [step for step in range(50, 1050, 50) for _ in (0, 1)]
    assert shown["steps"] == "20 of 100"


def test_long_groups_are_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "TOKENS", 5)
    run = save(folder, group(1, tokens=9, count=20) | {"prompt": "x" * 30_000})
    (found,) = load_samples(run, 1 << 20)["groups"]
    assert (len(found["responses"]), len(found["prompt"])) == (16, 20_000)
    first = found["responses"][0]
    assert [len(first[key]) for key in ("tokens", "ratio", "weight", "logprob", "entropy")] == [5] * 5
    assert (first["length"], first["hard"], first["soft"]) == (9, [0], [1])


def test_a_group_too_large_for_the_page_is_left_out(folder: Path) -> None:
    run = save(folder, group(1, 0, tokens=1000), group(1, 1))
    assert [one["group"] for one in load_samples(run, 5000)["groups"]] == [1]


def test_runs_share_the_page(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for name in folders:
        name.mkdir()
        (name / "metrics.jsonl").write_text('{"step": 1, "phase": "train", "time": 0, "reward/mean": 1}\n')
    save(folders[0], group(1))
    save(folders[2], group(1), group(2))
    text = write_report(folders, tmp_path / "out").read_text()
    runs = json.loads(scripts(text)[0])
    assert [(run["label"], len(run["groups"])) for run in runs] == [("a", 1), ("c", 2)]


def test_a_run_without_samples_has_no_browser(folder: Path) -> None:
    assert "<script" not in write_report([folder]).read_text()
    (folder / "samples.jsonl").write_text('{"step": 1, "gro')  # killed while it wrote its first line
    assert "<script" not in write_report([folder]).read_text()


def test_a_damaged_line_is_named(folder: Path) -> None:
    (folder / "samples.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"samples.jsonl, line 1, is damaged"):
        write_report([folder])
