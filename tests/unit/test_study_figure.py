"""The figure of docs/evidence.md: its bands, its rows, and the digest of what it shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from figure import CURVES, SPANS, bands, complete_rows, curve, digest, draw
from packed import Metrics
from paired import interval
from PIL import Image
from study_metrics import metrics


def test_bands_exclude_what_runs_of_a_seed_share() -> None:
    """With two arms the band is that of half of their difference, whatever the seeds add to both."""
    rng = np.random.default_rng(0)
    difference, shared = rng.normal(0.1, 0.02, (6, 3)), rng.normal(0, 5, (6, 3))
    found = bands({"a": shared + difference / 2, "b": shared - difference / 2})
    _, low, high = interval(difference.T)
    for mean, lower, upper in found.values():
        assert upper - lower == pytest.approx((high - low) / 2 * 2**0.5)
        assert upper - mean == pytest.approx(mean - lower)


def test_an_arm_whose_runs_collapse_widens_no_other_band() -> None:
    """Seeds collapse at different steps."""
    rng = np.random.default_rng(1)
    arms = {name: 0.5 + rng.normal(0, 0.01, (8, 5)) for name in ("a", "b", "c")}
    falls = np.where(np.arange(5) < np.arange(8)[:, None] - 1, 0.5, 0.0)
    found = bands({**arms, "inert": falls}, ["inert"])
    for name, band in bands(arms).items():
        for with_it, without in zip(found[name], band, strict=True):
            assert with_it == pytest.approx(without)
    for edge, plain in zip(found["inert"], interval(falls.T), strict=True):
        assert edge == pytest.approx(plain)


def test_figure_shows_rows_only_with_all_planned_runs(tmp_path: Path) -> None:
    names = ("reward/mean", "loss/entropy", "rollout/repeats", "rollout/retries")
    columns = {name: np.linspace(0.1, 0.5, 60) for name in names}
    seeds = (101, 102, 103)
    fresh = [metrics(columns, arm=arm, seed=seed) for arm in ("grpo", "aspo", "up", "no_is") for seed in seeds]
    stale = [metrics(columns, block="C", arm=arm, k=4, seed=seed) for arm in ("inert", "grpo") for seed in seeds]
    planned = [run.key for run in (*fresh, *stale)]
    picture = tmp_path / "figure.png"

    def height(made: Iterable[Metrics]) -> int:
        assert draw({run.key: run for run in made}, picture, planned)
        return plt.imread(picture).shape[0]

    both = height([*fresh, *stale])
    rows = complete_rows({run.key: run for run in (*fresh, *stale)}, planned)
    with Image.open(picture) as image:
        assert image.info[CURVES] == digest(rows)
    higher = {"reward/mean": columns["reward/mean"] + 0.01}
    changed = dataclasses.replace(stale[-1], train=stale[-1].train | higher)
    assert digest(complete_rows({run.key: run for run in (*fresh, *stale[:-1], changed)}, planned)) != digest(rows)
    assert 0.4 * both < height([*fresh, *stale[1:]]) < 0.7 * both  # the lower row has five of six runs, and so is none
    assert not draw({run.key: run for run in (*fresh[1:], *stale[1:])}, picture, planned)
    assert not picture.exists()  # nor does an older picture stay


def test_run_shorter_than_the_curve_has_a_point_per_step() -> None:
    run = metrics({"reward/mean": np.linspace(0.1, 0.5, 20)})
    assert curve(run, "Reward of the samples") == pytest.approx(np.linspace(0.1, 0.5, 20))
    assert len(curve(metrics({"reward/mean": np.ones(80)}), "Reward of the samples")) == SPANS
