"""The study's analysis: measures of a run, verdicts, and pages that equal a recount of the packed metrics."""

from __future__ import annotations

import dataclasses
import json
import lzma
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import page
import pytest
from analysis import evidence, parts
from claims import Claim, Comparison, comparisons, judge, judge_all, load_claims
from design import MARKS_FILE, Key, Run, marks, planned_seeds, runs
from figure import CURVES, complete_rows, digest
from measures import COLLAPSED, EQUAL_REWARD, MEASURES, entropy_at_equal_reward
from packed import RESULTS, SUFFIX, Metrics, load, pack
from page import BEGIN, END, missing_lines
from paired import interval, two_sided
from PIL import Image
from pydantic_core import to_jsonable_python
from study_metrics import metrics

from megatron_aspo.config.load import load_config
from megatron_aspo.errors import UserError
from megatron_aspo.policy.warmup import cache_path

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("evidence.md", "lab/objectives.md")


# The committed page


def test_pages_equal_a_recount_of_the_packed_runs() -> None:
    started = time.process_time()
    packed = load()
    judged = judge_all(packed.runs, load_claims())
    assert time.process_time() - started < 60  # of a core, for all 360 runs
    planned = {run.key for block in BLOCKS for run in runs(block, planned_seeds(block))}
    shown = digest(complete_rows(packed.runs, planned))
    with Image.open(DOCS / "evidence.png") as picture:
        assert picture.info[CURVES] == shown, "docs/evidence.png is of other runs: run `make evidence`"
    generated = parts(judged, packed, pictured=True)
    assert "inert 24 of 24, tis 18 of 24" in generated["unplanned"]  # warnings of the configuration say so
    texts = "".join((DOCS / name).read_text(encoding="utf-8") for name in PAGES)
    for name, part in generated.items():
        assert f"{BEGIN.format(name)}\n\n{part}\n\n{END.format(name)}" in texts, f"{name}: run `make evidence`"


def test_greedy_accuracy_is_as_the_page_says() -> None:
    packed = load().runs
    counted = [packed[run.key] for block in ("A", "B") for run in runs(block, planned_seeds(block))]
    high = [run for run in counted if MEASURES["final reward"](run) > 0.2]
    greedy = np.array([run.evaluation["eval/greedy_accuracy"][-1] for run in high])
    above = sum(g > MEASURES["pass@1"](run) for g, run in zip(greedy, high, strict=True))
    said = (DOCS / "lab" / "objectives.md").read_text(encoding="utf-8")
    assert f"{greedy.min():.2f} to {greedy.max():.2f}, above pass@1 in {above} of {len(greedy)};" in said


def test_size_of_the_page_and_of_the_packed_runs() -> None:
    text = (DOCS / "evidence.md").read_text(encoding="utf-8")
    beside_tables = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "<!--")))
    assert len([word for word in beside_tables.split() if any(map(str.isalpha, word))]) <= 550
    assert sum(path.stat().st_size for path in RESULTS.rglob(f"*{SUFFIX}")) <= 20e6


BLOCKS = ("A", "B", "C")


def test_every_planned_run_serves_a_claim_and_no_claim_lacks_one() -> None:
    planned = {run.key for block in BLOCKS for run in runs(block, planned_seeds(block))}
    needed = {key for test in comparisons(load_claims()) for seed in test.claim.seeds for key in test.keys(seed)}
    assert needed == planned


def test_every_seed_has_a_warm_start_that_its_runs_in_all_blocks_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "study" / "data").mkdir(parents=True)
    (tmp_path / "runs" / "study" / "data" / "problems.jsonl").write_text("{}")
    of_seed: dict[int, set[Path]] = {}
    for run in (runs(block, [seed])[-1] for block in BLOCKS for seed in planned_seeds(block)):
        config = load_config(DOCS.parent / "examples" / "study" / "countdown.yaml", run.settings)
        of_seed.setdefault(run.seed, set()).add(cache_path(config))
    assert all(len(paths) == 1 for paths in of_seed.values())
    assert len(set.union(*of_seed.values())) == len(of_seed) == 12


# From runs to pages


def write_run(
    folder: Path, run: Run, gap: float = 0.0, last: int | None = None, error: str | None = None, **changed: Any
) -> Path:
    """Files of a run of three epochs that trained up to step `last`. Its ratio gap is 0 in the first epoch and `gap` in
    the later ones. `changed` are settings that differ from the design's, as `optimizer__lr`."""
    path = folder / run.block / run.name
    path.mkdir(parents=True)
    config = load_config(DOCS.parent / "examples" / "study" / "countdown.yaml", run.settings)
    settings = to_jsonable_python(dataclasses.asdict(config))
    for name, value in changed.items():
        section, _, field = name.rpartition("__")
        (settings[section] if section else settings)[field] = value
    (path / "config.yaml").write_text(json.dumps(settings))
    (path / "git.txt").write_text("commit 0123abc\ndirty yes\n\n M README.md\n")
    (path / MARKS_FILE).write_text(json.dumps({**marks(run), "error": error}))
    ratios = {"loss/ratio_pos": 1 + gap * 2 / 3, "loss/ratio_neg": 1.0, "reward/mean": 0.5}
    ratios |= {"loss/ratio_pos_first_epoch": 1 + run.seed * 1e-5, "loss/ratio_neg_first_epoch": 1 + run.seed * 1e-5}
    steps = settings["train"]["steps"] if last is None else last
    records: list[dict[str, Any]] = [{"step": 10, "phase": "warmup", "time": 1.0, "loss/nll": 1.0}]
    records += [{"step": s, "phase": "train", "time": 2.0, "time/step": 1.0, **ratios} for s in range(1, steps + 1)]
    if last is None:
        records += [{"step": steps, "phase": "eval", "time": 3.0, "eval/accuracy": 0.5}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


PLANNED = planned_seeds("B")
GAPS = {seed: 0.02 + 0.001 * (seed * seed % 7) for seed in PLANNED}


def run_of_b(arm: str, seed: int) -> Run:
    return Run("B", arm, 1.5e-4, 0, seed)


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for seed, gap in GAPS.items():
        write_run(folder / "runs", run_of_b("grpo", seed), gap)
        write_run(folder / "runs", run_of_b("aspo", seed))
    assert len(pack(folder / "runs", folder / "results")) == 2 * len(PLANNED)
    for name in PAGES:
        (folder / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DOCS / name, folder / "docs" / name)
    return folder


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> Path:
    """A folder with the runs of block B, packed, and with the pages."""
    return Path(shutil.copytree(packed_once, tmp_path, dirs_exist_ok=True))


def rewrite_run(folder: Path, run: Run, *arguments: Any, **settings: Any) -> None:
    """Replace a run and its packed file, which is missing afterwards, by a run that `write_run` makes."""
    (folder / "results" / run.block / f"{run.name}{SUFFIX}").unlink()
    shutil.rmtree(folder / "runs" / run.block / run.name)
    write_run(folder / "runs", run, *arguments, **settings)


def recounted(folder: Path) -> tuple[str, list[str]]:
    judged, _ = evidence(folder / "docs", folder / "results", load_claims())
    return (folder / "docs" / "evidence.md").read_text(encoding="utf-8"), missing_lines(judged)


def test_verdict_on_the_page_is_that_of_the_runs(packed: Path) -> None:
    text, missing = recounted(packed)
    mean, low, high = interval(list(GAPS.values()))
    (row,) = (line for line in text.splitlines() if line.startswith("| 2. Mean r"))
    assert f"{mean:+.3g} [{low:+.3g}, {high:+.3g}] **reproduced**" in row
    assert row.endswith(f"| {len(PLANNED)} |")
    assert not any(line.startswith("B/grpo") for line in missing)
    assert f"B: {2 * len(PLANNED)} of {2 * len(PLANNED)}" in text
    lab = (packed / "docs" / "lab" / "objectives.md").read_text(encoding="utf-8")
    assert f"- 0123abc with uncommitted changes: {2 * len(PLANNED)} runs" in lab


def test_missing_run_takes_the_verdict_away_and_is_named(packed: Path) -> None:
    (packed / "results" / "B" / f"grpo-lr0.00015-k0-seed103{SUFFIX}").unlink()
    text, missing = recounted(packed)
    (row,) = (line for line in text.splitlines() if line.startswith("| 2. Mean r"))
    assert f"{len(PLANNED) - 1} of {len(PLANNED)} seeds" in row
    assert "reproduced" not in row
    assert "B/grpo-lr0.00015-k0-seed103: missing; claims 2, 2c" in missing


def test_packing_again_adds_finished_seeds_only(packed: Path) -> None:
    """A counted seed is packed when all its runs are over: those made on another machine had another warm start."""
    rewrite_run(packed, run_of_b("aspo", 101))
    rewrite_run(packed, run_of_b("aspo", 102), last=20)
    (packed / "results" / "B" / f"grpo-lr0.00015-k0-seed102{SUFFIX}").unlink()
    shutil.rmtree(packed / "runs" / "B" / "grpo-lr0.00015-k0-seed104")
    write_run(packed / "runs", run_of_b("grpo", 1))  # a pilot
    before = {path: path.read_bytes() for path in packed.glob("results/*/*")}
    new = pack(packed / "runs", packed / "results")
    names = {f"aspo-lr0.00015-k0-seed101{SUFFIX}", f"grpo-lr0.00015-k0-seed1{SUFFIX}"}
    assert {path.name for path in new} == names
    assert {path: path.read_bytes() for path in before} == before
    write_run(packed / "runs", run_of_b("aspo", 1))
    shutil.rmtree(packed / "runs" / "B" / "aspo-lr0.00015-k0-seed102")
    write_run(packed / "runs", run_of_b("aspo", 102))
    new = pack(packed / "runs", packed / "results")
    names = {f"{arm}-lr0.00015-k0-seed102{SUFFIX}" for arm in ("aspo", "grpo")} | {f"aspo-lr0.00015-k0-seed1{SUFFIX}"}
    assert {path.name for path in new} == names


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train__steps", 149),
        ("train__epochs", 2),
        ("train__mini_batch_prompts", 8),
        ("optimizer__lr", 3e-4),
        ("loss__objective", "aspo"),
        ("loss__dual_clip", None),
        ("loss__anchor", "rollout"),
        ("loss__kl_estimator", "k1"),
        ("rollout__max_staleness", 1),
        ("rollout__prompts_per_step", 32),
        ("warmup__updates", 800),
        ("warmup__seed", 102),
        ("data__seed", 102),
        ("seed", 102),
    ],
)
def test_run_with_settings_of_another_design_does_not_count(packed: Path, setting: str, value: Any) -> None:
    rewrite_run(packed, run_of_b("grpo", 103), GAPS[103], **{setting: value})
    pack(packed / "runs", packed / "results")
    found = load(packed / "results")
    (refused,) = found.refused
    assert refused.startswith(f"B/grpo-lr0.00015-k0-seed103 does not count: {setting.replace('__', '.')}=")
    assert sorted(key.seed for key in found.runs if key.arm == "grpo") == [seed for seed in PLANNED if seed != 103]
    text, _ = recounted(packed)
    (row,) = (line for line in text.splitlines() if line.startswith("| 2. Mean r"))
    assert f"{len(PLANNED) - 1} of {len(PLANNED)} seeds" in row
    assert f"- {refused}" in (packed / "docs" / "lab" / "objectives.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("mark", "why"), [("claims", "other claims"), ("design", "another design or task")])
def test_run_begun_under_other_claims_or_another_design_does_not_count(packed: Path, mark: str, why: str) -> None:
    for seed in (103, 1):  # a pilot fixes claims and design, and so is older than they are
        path = packed / "results" / "B" / f"grpo-lr0.00015-k0-seed{seed}{SUFFIX}"
        if seed == 1:
            write_run(packed / "runs", run_of_b("grpo", 1))
            pack(packed / "runs", packed / "results")
        content = json.loads(lzma.decompress(path.read_bytes()))
        content["marks"][mark] = "0123456789abcdef"
        path.write_bytes(lzma.compress(json.dumps(content).encode()))
    found = load(packed / "results")
    assert found.refused == [f"B/grpo-lr0.00015-k0-seed103 does not count: it was begun under {why}"]
    assert run_of_b("grpo", 1).key in found.runs


def test_run_that_an_error_ended_counts_with_its_last_values(packed: Path) -> None:
    rewrite_run(packed, run_of_b("aspo", 101), 0.02, last=20, error="RunError: not finite")
    rewrite_run(packed, run_of_b("aspo", 102), last=0, error="RunError: in the warm start")
    assert len(pack(packed / "runs", packed / "results")) == 1
    run = load(packed / "results").runs[run_of_b("aspo", 101).key]
    measured = {name: MEASURES[name](run) for name in ("collapse", "pass@1", "ratio gap, later epochs", "final reward")}
    assert measured == pytest.approx(
        {"collapse": 1, "pass@1": 0, "ratio gap, later epochs": 0.02, "final reward": 0.5}, abs=1e-5
    )
    assert list(run.train["step"]) == list(range(1, run.steps + 1))
    assert run.steps > 20
    recounted(packed)
    lab = (packed / "docs" / "lab" / "objectives.md").read_text(encoding="utf-8")
    assert "- B/aspo-lr0.00015-k0-seed101 was ended by RunError: not finite" in lab


def test_demonstration_shows_each_run_and_the_pass_that_an_anchor_at_the_sampler_saves(packed: Path) -> None:
    assert load(packed / "results").runs[run_of_b("grpo", 101).key].train["time/step"] == pytest.approx(1.0)
    assert page.demonstration({}) == "Not yet run."
    columns = {"reward/mean": [0.0, 0.1, 0.1, 0.3], "optimizer/grad_norm_max": [1, 9, 2, 1], "time/step": [20.0] * 4}
    held_out = {"eval/reward": 0.2}
    made = [metrics({**columns, "loss/entropy": [2.0] * 4}, held_out, block="smollm2", arm="aspo", seed=2)]
    made += [metrics({**columns, "time/old_logprobs": [5.0] * 4}, held_out, block="smollm2", arm="inert", seed=1)]
    sampled = [np.nan, np.nan, 6.0, np.nan]
    made += [metrics({**columns, "time/mismatch": sampled}, held_out, block="smollm2", arm="aspo_banded", seed=1)]
    rows = page.demonstration({run.key: run for run in [*made, metrics(columns)]}).splitlines()[2:]
    assert rows == [
        "|aspo|2|0|0.3|2|0.2|9|–|20|",
        "|aspo_banded|1|0|0.3|–|0.2|9|1.5|20|",
        "|inert|1|0|0.3|–|0.2|9|5|20|",
    ]
    assert {run.arm for run in runs("smollm2", planned_seeds("smollm2"))} == {"aspo_banded", "inert"}


def test_damaged_file_is_one_line(packed: Path) -> None:
    path = packed / "results" / "B" / f"grpo-lr0.00015-k0-seed103{SUFFIX}"
    path.write_bytes(path.read_bytes()[:-20])
    script = DOCS.parent / "examples" / "study" / "analysis.py"
    folders = ["--results", str(path.parents[1]), "--docs", str(packed / "docs")]
    command = [sys.executable, str(script), "evidence", *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert path.name in done.stderr
    assert done.stderr.count("\n") == 1


# Measures


def test_windows_and_ratios_of_sums() -> None:
    nan = float("nan")
    run = metrics(
        {
            "reward/mean": [1, 1, 0, 0, 0, 0, 0, 0, 0.2, 0.4],
            "loss/entropy": [5, 5, 5, 5, 5, 5, 5, 4, nan, nan],
            "loss/kl": [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 1e-3, 0.1],
            "rollout/retries": [9, 9, 9, 9, 9, 9, 9, 9, 1, 3],
            "rollout/repeats": [0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
            "loss/clip_fraction_pos": [0.01] * 10,
            "loss/clip_fraction_neg": [0.03] * 10,
            "loss/ratio_pos": [1.02] * 10,
            "loss/ratio_neg": [0.99] * 10,
            "loss/ratio_pos_first_epoch": [1.0] * 10,
            "loss/ratio_neg_first_epoch": [1.0] * 10,
            "optimizer/grad_norm_max": [1, 1, 1, 1, 100, 1, 1, 1, 1, nan],
        },
        {"eval/accuracy": 0.3},
    )
    others = ("repeated 4-grams", "pass@16")
    measured = {name: measure(run) for name, measure in MEASURES.items() if name not in others}
    assert measured == pytest.approx(
        {
            "pass@1": 0.3,
            "early reward": 1.0,  # steps 1 and 2 of ten
            "final reward": 0.3,  # steps 9 and 10
            "entropy": 4.0,  # the last steps had no updates: the last known value
            "repeated attempts": 1 / 4,
            "log10 KL": np.log10((1e-3 + 0.1) / 2),  # of two steps, the median is the mean
            "clip fraction": 0.02,
            "ratio gap, epoch 1": 0.0,
            "ratio gap, later epochs": 0.045,
            "log10 largest gradient norm": 2.0,
            "log10 p99 of gradient norms": np.log10(np.percentile([1] * 8 + [100], 99)),
            "collapse": 0.0,
        }
    )
    assert MEASURES["collapse"](metrics({"reward/mean": [1] * 10 + [COLLAPSED * 0.9] * 10})) == 1


def test_entropy_at_equal_reward_waits_for_the_faster_run() -> None:
    """Run b learns twice as fast. At the reward where a ends, both have the same entropy; at the end they do not."""
    step = np.arange(1, 101)
    a = metrics({"reward/mean": step / 400, "loss/entropy": 1 - step / 400})
    b = metrics({"reward/mean": step / 200, "loss/entropy": 1 - step / 200})
    at = entropy_at_equal_reward([a, b])
    assert at[0] == pytest.approx(at[1], abs=0.004)
    assert MEASURES["entropy"](a) - MEASURES["entropy"](b) == pytest.approx(90.5 / 400)


def test_rewards_without_a_common_level_are_not_compared() -> None:
    """Both runs have the same entropies at every step. One keeps a reward of 0.23, the other's falls from 0.22."""
    step = np.arange(1, 101)
    flat = metrics({"reward/mean": np.full(100, 0.23), "loss/entropy": 0.5 - step / 1000}, arm="aspo")
    falling = metrics({"reward/mean": 0.22 - step / 5000, "loss/entropy": 0.5 - step / 1000}, arm="grpo")
    assert np.isnan(entropy_at_equal_reward([flat, falling])).all()
    claim = Claim("x", "x", "A", {"aspo": 1, "grpo": -1}, EQUAL_REWARD, "higher", [1.5e-4], range(101, 104))
    made = {run.key: run for run in (flat, falling)}
    for seed, entropy in ((102, 0.5), (103, 0.6)):
        for arm, gain in (("aspo", 0.1), ("grpo", 0.0)):
            columns = {"reward/mean": step / 200, "loss/entropy": np.full(100, entropy + gain)}
            made[Key("A", arm, 1.5e-4, 0, seed)] = metrics(columns, arm=arm, seed=seed)
    judged = judge(Comparison(claim, 1.5e-4, (0,)), made)
    assert judged.contrasts == pytest.approx({102: 0.1, 103: 0.1})
    assert judged.undefined == [101]
    assert judged.verdict == "reproduced"
    (row,) = page.tests_table([judged]).splitlines()[2:]
    assert "| 2 of 3 |" in row
    for seed in (102, 103):
        for arm in ("aspo", "grpo"):
            made[Key("A", arm, 1.5e-4, 0, seed)] = dataclasses.replace(made[Key("A", arm, 1.5e-4, 0, 101)])
    nothing = judge(Comparison(claim, 1.5e-4, (0,)), made)
    assert (nothing.contrasts, nothing.verdict) == ({}, "undecided")


@pytest.mark.parametrize(("a", "b"), [((0.2, 0.3), (0.25, 0.25)), ((0.2, 0.4), (0.3, 0.1)), ((0.2, 0.3), (0.3, 0.2))])
def test_equal_entropies_at_every_reward_are_equal_at_equal_reward(
    a: tuple[float, float], b: tuple[float, float]
) -> None:
    """Entropy is a function of reward, whichever way the reward goes."""
    pair = [metrics({"reward/mean": r, "loss/entropy": 1 - r}) for r in (np.linspace(*a, 100), np.linspace(*b, 100))]
    at = entropy_at_equal_reward(pair)
    assert at[0] == pytest.approx(at[1], abs=1e-9)


def test_missing_metric_names_the_run() -> None:
    claim = Claim("x", "x", "A", {"aspo": 1}, "log10 KL", "higher", [1.5e-4], [101])
    run = metrics({"reward/mean": [0.5] * 10})
    with pytest.raises(UserError, match=r"A/aspo-lr0\.00015-k0-seed101 has no log10 KL"):
        judge(Comparison(claim, 1.5e-4, (0,)), {run.key: run})


# Verdicts


def study(values: Mapping[tuple[str, float, int], Iterable[float]]) -> dict[Key, Metrics]:
    """Runs with pass@1 (or a constant reward) of `values` by arm, learning rate and staleness, seeds from 101."""
    found: dict[Key, Metrics] = {}
    for (arm, lr, k), of_seed in values.items():
        for seed, value in enumerate(of_seed, 101):
            run = metrics({"reward/mean": [value] * 10}, {"eval/accuracy": value}, arm=arm, lr=lr, k=k, seed=seed)
            found[run.key] = run
    return found


NOISE = np.array([0.01, -0.01, 0.005, -0.005, 0.008, -0.008, 0.0, 0.0])


@pytest.mark.parametrize(
    ("expect", "beyond", "difference", "scale", "verdict"),
    [
        ("higher", 0.0, 0.05, 1, "reproduced"),
        ("higher", 0.0, -0.05, 1, "opposite"),
        ("higher", 0.0, 0.0, 1, "equal within the margin"),
        ("higher", 0.0, 0.0, 20, "undecided"),
        ("lower", 0.0, -0.05, 1, "reproduced"),
        ("lower", 0.0, 0.05, 1, "opposite"),
        ("equal", 0.0, 0.0, 1, "reproduced"),
        ("equal", 0.0, 0.06, 1, "opposite"),
        ("equal", 0.0, 0.03, 1, "undecided"),
        ("higher", 0.03, 0.05, 1, "reproduced"),
        ("higher", 0.03, 0.035, 3, "undecided"),
    ],
)
def test_four_verdicts(expect: Any, beyond: float, difference: float, scale: float, verdict: str) -> None:
    made = study({("aspo", 1.5e-4, 0): 0.5 + difference + scale * NOISE, ("grpo", 1.5e-4, 0): [0.5] * 8})
    arms = {"aspo": 1.0, "grpo": -1.0}
    claim = Claim("x", "x", "A", arms, "pass@1", expect, [1.5e-4], range(101, 109), margin=0.03, beyond=beyond)
    judged = judge(Comparison(claim, 1.5e-4, (0,)), made)
    assert judged.verdict == verdict
    assert judged.mean == pytest.approx(difference)


@pytest.mark.parametrize(("collapses", "verdict"), [(8, "reproduced"), (6, "reproduced"), (5, "undecided")])
def test_collapses_are_compared_exactly(collapses: int, verdict: str) -> None:
    made = study({("inert", 1.5e-4, 4): [0.0] * collapses + [0.4] * (8 - collapses), ("grpo", 1.5e-4, 4): [0.4] * 8})
    arms = {"inert": 1.0, "grpo": -1.0}
    claim = Claim("x", "x", "A", arms, "collapse", "higher", [1.5e-4], range(101, 109), k=[4])
    assert judge(Comparison(claim, 1.5e-4, (4,)), made).verdict == verdict


@pytest.mark.parametrize(
    ("expect", "beyond", "difference", "alone", "in_family"),
    [
        ("higher", 0.0, 0.0065, "reproduced", "undecided"),
        ("higher", 0.0, -0.0065, "opposite", "undecided"),
        ("higher", 0.01, -0.0065, "opposite", "undecided"),
        ("higher", 0.01, 0.0165, "reproduced", "undecided"),
        ("equal", 0.0, 0.0365, "opposite", "undecided"),
        ("equal", 0.0, -0.0365, "opposite", "undecided"),
        ("equal", 0.0, 0.0245, "reproduced", "undecided"),
        ("higher", 0.0, -0.0085, "opposite", "opposite"),
        ("equal", 0.0, 0.0385, "opposite", "opposite"),
        ("equal", 0.0, 0.0, "reproduced", "reproduced"),
    ],
)
def test_every_verdict_on_a_primary_claim_needs_holms_p_value(
    expect: Any, beyond: float, difference: float, alone: str, in_family: str
) -> None:
    """.025 < p < .05 is not enough among two primary claims, whether the other is undecided or lacks its runs. Then it
    is not yet undecided: the other may turn out to have the smaller p-value."""
    noise = NOISE - NOISE.mean()
    made = study({("aspo", 1.5e-4, 0): 0.5 + difference + noise, ("grpo", 1.5e-4, 0): [0.5] * 8})
    arms, seeds = {"aspo": 1.0, "grpo": -1.0}, range(101, 109)
    means: dict[str, str] = dict.fromkeys(page.VERDICTS, "it matters")
    del means["equal within the margin"]
    one = Claim(
        "1", "x", "A", arms, "pass@1", expect, [1.5e-4], seeds, margin=0.03, beyond=beyond, primary=1.5e-4, means=means
    )
    other = Claim("2", "x", "A", {"up": 1.0}, "pass@1", "higher", [1.5e-4], seeds, primary=1.5e-4)
    (by_itself,) = judge_all(made, [one])
    waiting, _ = judge_all(made, [one, other])
    first, second = judge_all(made | study({("up", 1.5e-4, 0): noise}), [one, other])
    assert second.verdict == "undecided"
    assert by_itself.verdict == alone
    for judged in (waiting, first):
        assert judged.adjusted
        assert judged.adjusted[0] == pytest.approx(min(1, 2 * by_itself.decisive))
    expected = {in_family, "equal within the margin"} if expect == "higher" else {in_family}
    assert first.verdict in expected
    decided = first.verdict in ("reproduced", "opposite")
    assert waiting.verdict == (first.verdict if decided else "waits for the family")
    assert (page.meaning([waiting]) == page.meaning([])) == (waiting.verdict not in means)


@pytest.mark.parametrize(
    ("expect", "difference", "verdict", "line"),
    [
        ("equal", 0.0, "reproduced", "- It matters (1.5e-4, ± 0.03)."),
        ("equal", 0.2, "opposite", "- It matters (1.5e-4)."),
        ("higher", 0.2, "reproduced", "- It matters (1.5e-4)."),
        ("higher", 0.0, "equal within the margin", "- It matters (1.5e-4, ± 0.03)."),
    ],
)
def test_equality_is_said_with_its_margin(expect: Any, difference: float, verdict: str, line: str) -> None:
    made = study({("aspo", 1.5e-4, 0): 0.5 + difference + NOISE - NOISE.mean(), ("grpo", 1.5e-4, 0): [0.5] * 8})
    arms = {"aspo": 1.0, "grpo": -1.0}
    means: dict[str, str] = dict.fromkeys(page.VERDICTS, "it matters")
    claim = Claim("1", "x", "A", arms, "pass@1", expect, [1.5e-4], range(101, 109), margin=0.03, means=means)
    judged = judge_all(made, [claim])
    assert judged[0].verdict == verdict
    assert page.meaning(judged) == line
    row = page.arms_table(judged, made).splitlines()[2]
    value = f"{0.5 + difference:.3g}"  # of reward and pass@1
    assert row == f"| aspo | {value} | {value} | 0 |"


def test_equality_of_a_primary_claim_needs_holms_p_value() -> None:
    made = study({("aspo", 1.5e-4, 0): 0.5 + 4 * NOISE, ("grpo", 1.5e-4, 0): [0.5] * 8})
    arms, seeds = {"aspo": 1.0, "grpo": -1.0}, range(101, 109)
    one = Claim("1", "x", "A", arms, "pass@1", "higher", [1.5e-4], seeds, margin=0.0245, primary=1.5e-4)
    other = Claim("2", "x", "A", {"up": 1.0}, "pass@1", "higher", [1.5e-4], seeds, primary=1.5e-4)
    (alone,) = judge_all(made, [one])
    waiting, _ = judge_all(made, [one, other])
    first, _ = judge_all(made | study({("up", 1.5e-4, 0): NOISE - NOISE.mean()}), [one, other])
    assert alone.p_equal
    assert 0.025 < alone.p_equal < 0.05
    assert [judged.verdict for judged in (alone, waiting, first)] == [
        *("equal within the margin", "waits for the family", "undecided")
    ]


def test_a_decided_collapse_waits_for_the_other_blocks() -> None:
    """McNemar's smallest p-value of eight seeds, .0078, is above .05 / 7 until another primary claim has a smaller one:
    the page may not call it undecided while runs are missing."""
    columns = {"reward/mean": [0.4] * 10}
    keys = [
        key
        for test in comparisons(load_claims())
        if test.claim.block == "C"
        for s in range(101, 109)
        for key in test.keys(s)
    ]
    runs_of_c = {}
    for key in keys:
        gone = key.arm == "inert" and key.k > 0
        made = metrics(
            {name: [0.0] * 10 if gone else x for name, x in columns.items()} | {"loss/entropy": [0.5] * 10},
            {"eval/accuracy": 0.3 * (not gone)},
        )
        runs_of_c[key] = dataclasses.replace(made, key=key)
    judged = [j for j in judge_all(runs_of_c, load_claims()) if j.test.primary and j.test.claim.id == "5a"]
    assert [(j.verdict, j.p) for j in judged] == [("waits for the family", pytest.approx(2 / 2**8))]
    assert "cannot be told apart" not in page.meaning(judged)


def test_best_rates_and_slopes() -> None:
    seeds = [101, 102, 103]
    arms = {"aspo": 1.0, "grpo": -1.0}
    made = study(
        {
            ("aspo", 1.5e-4, 0): [0.3, 0.3, 0.3],
            ("aspo", 5e-4, 0): [0.5, 0.4, 0.3],
            ("grpo", 1.5e-4, 0): [0.31, 0.32, 0.33],
            ("grpo", 5e-4, 0): [0.1, 0.2, 0.3],
        }
    )
    best = Claim("x", "x", "A", arms, "pass@1", "higher", [1.5e-4, 5e-4, "best"], seeds)
    judged = judge(Comparison(best, "best", (0,)), made)
    assert list(judged.contrasts.values()) == pytest.approx([0.5 - 0.31, 0.4 - 0.32, 0.3 - 0.33])
    assert judged.decisive == pytest.approx(2 * float(two_sided(list(judged.contrasts.values()))))
    assert (judged.low, judged.high) == pytest.approx(interval(list(judged.contrasts.values()), 0.975)[1:])
    del made[Key("A", "aspo", 1.5e-4, 0, 102)]  # unused, but it decides which rate is best
    assert judge(Comparison(best, "best", (0,)), made).verdict == "2 of 3 seeds"

    growth = {"aspo": 0.01, "grpo": 0.0}
    stale = study({(arm, 1.5e-4, k): [0.3 + growth[arm] * k] * 3 for arm in arms for k in (1, 4, 8)})
    slope = Claim("x", "x", "A", arms, "pass@1", "higher", [1.5e-4], seeds, k=[1, 4, 8], slope=True)
    assert judge(Comparison(slope, 1.5e-4, (1, 4, 8)), stale).mean == pytest.approx(0.01)
