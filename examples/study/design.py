"""The runs of the study: blocks, arms, settings, and the marks by which a run shows what it was made under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_aspo.config.load import changes, load_config
from megatron_aspo.config.run import RunConfig

ROOT = Path(__file__).parents[2]
COUNTDOWN = Path(__file__).with_name("countdown.yaml")
CLAIMS_FILE = Path(__file__).with_name("claims.yaml")
FOLDER = ROOT / "runs" / "study"
MARKS_FILE = "study.json"
"""In a run's folder: its marks, and the error that ended it."""

ARMS: dict[str, list[str]] = {
    "aspo": ["loss.objective=aspo"],
    "grpo": ["loss.objective=grpo"],
    "up": ["loss.objective=up"],
    "no_is": ["loss.objective=no_is"],
    "response_mean_is": ["loss.objective=response_mean_is"],
    "aspo_no_cap": ["loss.objective=aspo", "loss.dual_clip=null"],
    "aspo_unmasked": ["loss.objective=aspo_unmasked"],
    "no_is_pos": ["loss.objective=no_is_pos"],
    "tis": ["loss.objective=tis"],
    "inert": ["loss.objective=grpo", "loss.anchor=trainer"],
    "aspo_banded": ["loss.objective=aspo", "loss.anchor_band=[0.2,5]"],
}
"""The settings of each arm, which follow those of its block."""

MEASURED_KL = ["loss.kl_coef=1.0e-9", "loss.kl_estimator=k1"]
"""Measures the KL to the start without a force.

k1's slope is 1 at every token, so that a billionth of it does not act; k3's grows like 1/ratio, up to e^20. The mean of
k1 over fresh samples is unbiased, and has no heavy tail.
"""

REGIME = ["train.epochs=2", *MEASURED_KL]
"""Settings of block A besides the configuration's, as the gate has chosen them: 16 updates a batch."""

REUSE = ["rollout.prompts_per_step=16", "train.mini_batch_prompts=4", "train.epochs=3"]
ASYNCHRONOUS = [
    *("rollout.prompts_per_step=8", "train.mini_batch_prompts=8", "train.epochs=1"),
    "loss.anchor=rollout",
]

PILOTS = range(1, 101)
"""Seeds of runs that fixed the design. No verdict counts them, and they may have another number of steps."""


@dataclass(frozen=True, order=True)
class Key:
    """Identity of a run: block, arm (objective and anchor), learning rate, staleness in steps, seed."""

    block: str
    arm: str
    lr: float
    k: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-lr{self.lr:g}-k{self.k}-seed{self.seed}"


@dataclass(frozen=True)
class Block:
    """Runs of several arms with the same settings.

    Attributes:
        steps: of a run at each learning rate.
        staleness: ages of the training batches, in steps.
        fresh_arms: the arms at staleness 0, if these are fewer. With one update per batch and fresh samples every
            ratio is 1, so that other arms have the same gradients.
        ranks: processes of a run; one shares the imports of this process.
        seeds: of a demonstration, which no claim counts; None: those of claims.yaml.
    """

    arms: tuple[str, ...]
    steps: dict[float, int]
    settings: Sequence[str] = ()
    staleness: tuple[int, ...] = (0,)
    fresh_arms: tuple[str, ...] = ()
    config: Path = COUNTDOWN
    ranks: int = 1
    seeds: range | None = None


BLOCKS = {
    "A": Block(
        ("grpo", "aspo", "up", "no_is", "response_mean_is", "aspo_no_cap", "aspo_unmasked", "no_is_pos"),
        {1.5e-4: 30, 5e-4: 20},
        REGIME,
    ),
    "B": Block(("grpo", "aspo"), {1.5e-4: 30}, REUSE),
    "C": Block(("inert", "tis", "no_is", "grpo", "aspo", "up"), {5e-4: 80}, ASYNCHRONOUS, (0, 1, 4, 8), ("inert",)),
    # A demonstration on a real model, which `make smollm2` creates: vLLM on a rank of its own, one update per batch.
    "smollm2": Block(
        ("inert", "aspo_banded"),  # vLLM rounds otherwise than the trainer, and the model is in bfloat16
        {1e-5: 20},
        [
            *("loss.anchor=rollout", "rollout.ranks=1", "rollout.max_staleness=1"),
            *("train.mini_batch_prompts=8", "train.epochs=1", "checkpoint.every=10"),
        ],
        (1,),
        config=ROOT / "examples" / "smollm2_135m.yaml",
        ranks=2,
        seeds=range(1, 3),
    ),
}


@dataclass(frozen=True)
class Run:
    block: str
    arm: str
    lr: float
    staleness: int
    seed: int

    @property
    def key(self) -> Key:
        return Key(self.block, self.arm, self.lr, self.staleness, self.seed)

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def folder(self) -> Path:
        return FOLDER / self.block / self.name

    @property
    def steps(self) -> int:
        return BLOCKS[self.block].steps[self.lr]

    @property
    def settings(self) -> list[str]:
        block = BLOCKS[self.block]
        own = [
            f"name={self.name}",
            f"seed={self.seed}",
            f"optimizer.lr={self.lr}",
            f"train.steps={self.steps}",
            "checkpoint.resume=auto",
        ]
        if block.ranks == 1:  # a seed has a warm start of its own, which its runs in all blocks share
            own += [f"data.seed={self.seed}", f"warmup.seed={self.seed}"]
            own += [f"rollout.max_staleness={self.staleness}"]
        return [*block.settings, *own, *ARMS[self.arm]]


def runs(block: str, seeds: Sequence[int]) -> list[Run]:
    """All runs of a block, ordered by seed."""
    design = BLOCKS[block]
    return [
        Run(block, arm, lr, k, seed)
        for seed in seeds
        for lr in design.steps
        for k in design.staleness
        for arm in (design.fresh_arms if k == 0 and design.fresh_arms else design.arms)
    ]


def planned_run(key: Key) -> Run | None:
    """Return the run of a key; None if the design has no such run."""
    return next((run for block in BLOCKS for run in runs(block, [key.seed]) if run.key == key), None)


@cache
def claims_content() -> Any:
    return OmegaConf.to_container(OmegaConf.load(CLAIMS_FILE))


def planned_seeds(block: str) -> range:
    """The planned seeds of a block of runs, from claims.yaml; a demonstration has its own."""
    if seeds := BLOCKS[block].seeds:
        return seeds
    content = claims_content()
    first = content["first_seed"]
    return range(first, first + content["seeds"][block])


# Marks


def marks(run: Run) -> dict[str, str]:
    """Return digests of what a run is made under: the claims, and its design (configuration, settings, task). Claims
    and task are the study's, not a demonstration's."""
    block = BLOCKS[run.block]
    config: Any = OmegaConf.to_container(OmegaConf.load(block.config))
    design = [config, run.settings]
    if block.seeds is not None:
        return {"claims": "none", "design": _digest(design)}
    task = Path(__file__).with_name("countdown.py").read_text(encoding="utf-8")
    return {"claims": _digest(claims_content()), "design": _digest([*design, task])}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def faults(key: Key, settings: dict[str, Any], made_under: dict[str, str]) -> Iterator[str]:
    """Yield why a run does not count: settings that are not the design's, other claims. Pilots are older than both."""
    run = planned_run(key)
    if run is None:
        yield "the design has no such run"
        return
    block = BLOCKS[run.block]
    if key.seed in PILOTS and block.seeds is None:
        return
    first = replace(run, seed=1)
    config = _config(block.config, tuple(first.settings))
    data, warmup = config.data, config.warmup
    if block.ranks == 1:
        data, warmup = replace(data, seed=key.seed), replace(warmup, seed=key.seed)
    planned = replace(config, seed=key.seed, data=data, warmup=warmup)
    different = [
        change.replace("(was ", "is planned, the run has ").rstrip(")") for change in changes(settings, planned)
    ]
    yield from different
    now = marks(run)
    if not different and made_under["design"] != now["design"]:
        yield "it was begun under another design or task"
    if made_under["claims"] != now["claims"]:
        yield "it was begun under other claims"


@cache
def _config(path: Path, settings: tuple[str, ...]) -> RunConfig:
    return load_config(path, list(settings))
