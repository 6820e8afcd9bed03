"""The claims of claims.yaml and their verdicts from the metrics of packed runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from design import CLAIMS_FILE, Key
from measures import EQUAL_REWARD, MEASURES, entropy_at_equal_reward
from numpy.typing import ArrayLike
from omegaconf import OmegaConf
from packed import Metrics
from paired import Numbers, holm, interval, sign_test, t_test, tost

from megatron_aspo.errors import UserError

ALPHA = 0.05

Runs = Mapping[Key, Metrics]
Rate = float | str
"""A learning rate, or "best"."""


@dataclass(frozen=True, eq=False)
class Claim:
    """A claim of claims.yaml, whose comments define the fields. `seeds` are the planned ones."""

    id: str
    text: str
    block: str
    arms: dict[str, float]
    metric: str
    expect: Literal["higher", "lower", "equal"]
    lr: list[Rate]
    seeds: Sequence[int]
    k: list[int] = field(default_factory=lambda: [0])
    margin: float | None = None
    beyond: float = 0.0
    slope: bool = False
    primary: float | None = None
    headline: bool = False
    means: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A claim at one learning rate, and at one staleness or, for a slope, over several."""

    claim: Claim
    lr: Rate
    ks: tuple[int, ...]

    @property
    def primary(self) -> bool:
        return self.lr == self.claim.primary

    def keys(self, seed: int) -> list[Key]:
        """Return the runs of a seed that the test needs."""
        rates = [float(lr) for lr in (self.claim.lr if self.lr == "best" else [self.lr]) if lr != "best"]
        return [Key(self.claim.block, arm, lr, k, seed) for lr in rates for k in self.ks for arm in self.claim.arms]

    @property
    def choices(self) -> int:
        """Learning rates among which each arm's own is chosen by its runs, for which p-values are corrected."""
        return len(self.claim.lr) - 1 if self.lr == "best" else 1

    def p_values(self, contrasts: Numbers) -> tuple[Numbers, Numbers]:
        """Return the p-values of "reproduced" and of "opposite", from contrasts by seed along the last axis."""
        claim = self.claim
        if claim.expect == "equal":
            assert claim.margin is not None
            p = tost(contrasts, claim.margin)
            outside = np.minimum(t_test(contrasts, claim.margin)[0], t_test(contrasts, -claim.margin)[1])
            opposite = np.minimum(1.0, 2 * outside)
        else:
            d = contrasts if claim.expect == "higher" else -contrasts
            if claim.metric == "collapse":
                both, side = sign_test(d), d.mean(-1)
                p, opposite = np.where(side > 0, both, 1.0), np.where(side < 0, both, 1.0)
            else:  # two-sided tests, by the side on which the mean lies
                p, opposite = 2 * t_test(d, claim.beyond)[0], 2 * t_test(d)[1]
        return np.minimum(1.0, self.choices * p), np.minimum(1.0, self.choices * opposite)

    def p_equal(self, contrasts: Numbers) -> Numbers | None:
        """Return the p-value of "equal within the margin", None for a claim without one."""
        margin = self.claim.margin
        return None if margin is None else np.minimum(1.0, self.choices * tost(contrasts, margin))


@dataclass(frozen=True)
class Judged:
    """A test, its contrasts by seed and what follows from them.

    Attributes:
        contrasts: of the seeds that have all runs, without those in which the metric is not defined.
        arms: mean of the metric by arm, at each staleness.
        p: p-value of "reproduced"; `p_opposite` of "opposite". NaN with fewer than two seeds.
        p_equal: p-value of "equal within the margin", None for a claim without one.
        p_sign: p-value of the sign test.
        undefined: seeds that have all runs, and no value: their runs have no reward in common.
        missing: planned runs that are not packed.
        rates: the learning rate of each arm.
        adjusted: Holm's p-values of the smaller of `p` and `p_opposite`, and of `p_equal`; None outside the family.
        waits: whether tests of its family lack runs. They count as p = 1, and may lower the adjusted p-values later.
    """

    test: Comparison
    contrasts: dict[int, float]
    arms: dict[str, list[float]]
    mean: float
    low: float
    high: float
    p: float
    p_opposite: float
    p_equal: float | None
    p_sign: float
    undefined: list[int]
    missing: list[Key]
    rates: dict[str, Rate]
    adjusted: tuple[float, float] | None = None
    waits: bool = False

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def decisive(self) -> float:
        """The smaller of the p-values of "reproduced" and "opposite"."""
        return min(self.p, self.p_opposite)

    @property
    def verdict(self) -> str:
        """One of the four verdicts, or the reason why there is none: runs are missing, its own or, where its p-value is
        at most .05 by itself, others of its family."""
        if self.missing:
            n = len(self.contrasts) + len(self.undefined)
            return f"{n} of {len(self.test.claim.seeds)} seeds" if n else "not yet run"
        p, p_equal = self.adjusted or (self.decisive, self.p_equal)
        if p <= ALPHA:
            return "reproduced" if self.p <= self.p_opposite else "opposite"
        if self.waits and self.decisive <= ALPHA:
            return "waits for the family"
        if self.test.claim.expect == "equal" or self.p_equal is None or p_equal is None:
            return "undecided"
        if p_equal <= ALPHA:
            return "equal within the margin"
        return "waits for the family" if self.waits and self.p_equal <= ALPHA else "undecided"


def load_claims(path: Path = CLAIMS_FILE) -> list[Claim]:
    content: Any = OmegaConf.to_container(OmegaConf.load(path))  # a copy, which is changed below
    rates, first = content["rates"], content["first_seed"]
    claims: list[Claim] = []
    for entry in content["claims"]:
        entry["lr"] = [rates.get(lr, lr) for lr in entry.get("lr", rates)]
        entry["primary"] = rates.get(entry.get("primary"))
        claims.append(Claim(**entry, seeds=range(first, first + content["seeds"][entry["block"]])))
    unknown = {c.metric for c in claims} - {*MEASURES, EQUAL_REWARD}
    if unknown:
        raise UserError(f"{path}: no such metric: {', '.join(sorted(unknown))}; measures.py has them")
    return claims


def comparisons(claims: Sequence[Claim]) -> list[Comparison]:
    return [
        Comparison(claim, lr, ks)
        for claim in claims
        for lr in claim.lr
        for ks in ([tuple(claim.k)] if claim.slope else [(k,) for k in claim.k])
    ]


def rates_of(test: Comparison, runs: Runs, seeds: Sequence[int]) -> dict[str, Rate]:
    """Return the learning rate of each arm; for "best" those chosen from these seeds, which have all runs."""
    return {**best_rates(test, runs, seeds)} if test.lr == "best" else dict.fromkeys(test.claim.arms, test.lr)


def contrasts_of(test: Comparison, runs: Runs, seeds: Sequence[int]) -> dict[int, dict[str, Numbers]]:
    """Return, for each seed that has all runs, the metric of every arm: an array over the test's stalenesses.

    It is NaN for arms that cannot be compared in this seed.
    """
    there = [seed for seed in seeds if all(key in runs for key in test.keys(seed))]
    rates = rates_of(test, runs, there)
    found: dict[int, dict[str, Numbers]] = {}
    for seed in there:
        by_k: list[list[float]] = []
        for k in test.ks:
            beside = [runs[Key(test.claim.block, arm, float(lr), k, seed)] for arm, lr in rates.items()]
            by_k.append(values(test.claim.metric, beside))
        found[seed] = dict(zip(rates, np.array(by_k).T, strict=True))
    return found


def values(metric: str, runs: Sequence[Metrics]) -> list[float]:
    """Return the metric of each run of a seed."""
    if metric == EQUAL_REWARD:
        return entropy_at_equal_reward(runs)
    numbers = [MEASURES[metric](run) for run in runs]
    for run, number in zip(runs, numbers, strict=True):
        if math.isnan(number):
            raise UserError(f"{run.key.block}/{run.key.name} has no {metric}; delete the packed run and make it again")
    return numbers


def best_rates(test: Comparison, runs: Runs, seeds: Sequence[int]) -> dict[str, float]:
    """Return the learning rate of each arm at which its mean pass@1 over the seeds is highest."""
    keys = [key for seed in seeds for key in test.keys(seed)]
    found: dict[str, float] = {}
    for arm in test.claim.arms:
        by_rate = {
            lr: np.mean([MEASURES["pass@1"](runs[key]) for key in keys if (key.arm, key.lr) == (arm, lr)])
            for lr in sorted({key.lr for key in keys})
        }
        if by_rate:
            found[arm] = max(by_rate, key=lambda lr: by_rate[lr])
    return found


def reduce(test: Comparison, by_arm: Mapping[str, Numbers]) -> float:
    """Return the contrast of a seed, or its slope in staleness."""
    contrast = np.sum([factor * by_arm[arm] for arm, factor in test.claim.arms.items()], axis=0)
    if not test.claim.slope:
        return float(contrast[0])
    ks = np.array(test.ks, dtype=np.float64) - np.mean(test.ks)
    return float((ks * contrast).sum() / (ks**2).sum())


def judge(test: Comparison, runs: Runs) -> Judged:
    """Judge a test from the runs that are there."""
    every = contrasts_of(test, runs, test.claim.seeds)
    found = {seed: by_arm for seed, by_arm in every.items() if not np.isnan(list(by_arm.values())).any()}
    contrasts = {seed: reduce(test, by_arm) for seed, by_arm in found.items()}
    d = np.array(list(contrasts.values()))
    mean, low, high = span(d, 1 - ALPHA / test.choices)
    several = len(d) > 1
    p, p_opposite = test.p_values(d) if several else (math.nan, math.nan)
    p_equal = test.p_equal(d) if several else None
    return Judged(
        test=test,
        contrasts=contrasts,
        arms={a: np.array([by_arm[a] for by_arm in found.values()]).mean(0).tolist() for a in test.claim.arms if found},
        mean=mean,
        low=low,
        high=high,
        p=float(p),
        p_opposite=float(p_opposite),
        p_equal=None if p_equal is None else float(p_equal),
        p_sign=float(sign_test(d)) if several else math.nan,
        undefined=[seed for seed in every if seed not in found],
        missing=[key for seed in test.claim.seeds for key in test.keys(seed) if key not in runs],
        rates=rates_of(test, runs, list(every)),
    )


def span(numbers: ArrayLike, level: float) -> tuple[float, float, float]:
    """Return the mean and both ends of its interval; NaN without numbers."""
    if not np.size(numbers):
        return math.nan, math.nan, math.nan
    mean, low, high = interval(numbers, level)
    return float(mean), float(low), float(high)


def judge_all(runs: Runs, claims: Sequence[Claim]) -> list[Judged]:
    """Judge every test, with Holm's correction over the primary family, whether its runs are there or not."""
    judged = [judge(test, runs) for test in comparisons(claims)]
    family = [i for i, j in enumerate(judged) if j.test.primary]
    decisive = holm([_or_one(judged[i], judged[i].decisive) for i in family])
    equal = holm([_or_one(judged[i], judged[i].p_equal) for i in family])
    waits = not all(judged[i].complete for i in family)
    for i, *adjusted in zip(family, decisive, equal, strict=True):
        judged[i] = replace(judged[i], adjusted=(float(adjusted[0]), float(adjusted[1])), waits=waits)
    return judged


def _or_one(judged: Judged, p: float | None) -> float:
    """The p-value, or 1 for a test that lacks runs or values."""
    return 1.0 if p is None or math.isnan(p) or not judged.complete else p
