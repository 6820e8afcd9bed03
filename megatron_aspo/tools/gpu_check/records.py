"""The record of a check: the GPUs and seconds that it needs, and the bounds of its numbers. Imports no torch."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Numbers = dict[str, float]
Bounds = dict[str, tuple[float, float]]

ANY = (-math.inf, math.inf)
"""Bounds of a number that is only reported."""

MODULES = ("installation", "loss", "layers", "optimizer", "vllm", "layouts", "runs", "recipe")
"""The modules `checks_*`, in the order in which their checks start."""


@dataclass(frozen=True)
class Lab:
    """Where and on what a check runs.

    Attributes:
        folder: files that the checks share.
        device: "cuda", or "cpu" for tiny sizes, which test the checks and no machine.
        bare: no Hugging Face model; Megatron's local layers where there is no Transformer Engine.
        recipe, overrides: of the run that the last check cuts down.
    """

    folder: str
    device: str = "cuda"
    bare: bool = False
    recipe: str = ""
    overrides: tuple[str, ...] = ()

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of each check's process."""
        bare = {"MEGATRON_ASPO_LAYERS": "local", "TORCH_COMPILE_DISABLE": "1"} if self.bare else {}
        return bare | ({"TRITON_INTERPRET": "1"} if self.small else {})


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: its number or numbers, and a few words.
        target: import path of a function `Lab` -> numbers.
        seconds: time until the process is killed; more if earlier checks were faster than that.
        bounds: name of a number -> smallest and largest value. A number that is missing or not finite fails the check.
        after: name of a check whose files this one reads.
        bare: needs torch, Triton and Megatron-Core alone.
        on_cpu: can run at tiny sizes on a CPU.
    """

    name: str
    target: str
    seconds: float
    bounds: Bounds
    gpus: int = 1
    after: str = ""
    bare: bool = False
    on_cpu: bool = False
    environment: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def numbers(self) -> set[str]:
        """Its numbers, as `--only` takes them."""
        return set(self.name.split(" ")[0].split("+"))


def keep_largest(found: Numbers, numbers: Numbers) -> None:
    """Raise the numbers in `found` to new ones. NaN stays, which `max` may drop."""
    for name, value in numbers.items():
        known = found.get(name, value)
        found[name] = value if math.isnan(value) or value > known else known


CHECKS: list[Check] = []
"""All checks of the modules that have been imported."""


def check(
    name: str, seconds: float, bounds: Bounds, *, environment: dict[str, str] | None = None, **options: Any
) -> Callable[[Callable[[Lab], Numbers]], Callable[[Lab], Numbers]]:
    """Record a function as a check; `options` are attributes of `Check`."""

    def register(function: Callable[[Lab], Numbers]) -> Callable[[Lab], Numbers]:
        target = f"{function.__module__}:{function.__name__}"
        CHECKS.append(Check(name, target, seconds, bounds, environment=environment or {}, **options))
        return function

    return register


def load_checks(modules: Sequence[str] = MODULES) -> list[Check]:
    """The checks of modules, in the order of the modules, whichever was imported first."""
    names = [f"{__package__}.checks_{name}" for name in modules]
    for name in names:
        importlib.import_module(name)
    own = [check for check in CHECKS if check.target.partition(":")[0] in names]
    return sorted(own, key=lambda check: names.index(check.target.partition(":")[0]))


def startable(waiting: Sequence[Check], free: int, unfinished: set[str]) -> Check | None:
    """The next check for `free` GPUs; it waits for the one that it comes after."""
    return next((check for check in waiting if check.gpus <= free and check.after not in unfinished), None)


def planned_ends(checks: Sequence[Check], gpus: int) -> dict[str, float]:
    """Name -> seconds from the start to the check's end if all take their whole time on `gpus` GPUs."""
    waiting, running, now = list(checks), list[tuple[float, Check]](), 0.0
    ends: dict[str, float] = {}
    while waiting or running:
        unfinished = {check.name for check in waiting} | {check.name for _, check in running}
        if check := startable(waiting, gpus - sum(check.gpus for _, check in running), unfinished):
            waiting.remove(check)
            running.append((now + check.seconds, check))
            continue
        now, check = min(running, key=lambda entry: entry[0])
        running.remove((now, check))
        ends[check.name] = now
    return ends
