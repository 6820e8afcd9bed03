"""Settings of what a run records."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from megatron_aspo.config.fields import SETTINGS, Text
from megatron_aspo.config.rules import require, require_known

TRACKERS = ("tensorboard", "wandb", "mlflow")
"""Built-in trackers. Any other is named by its import path, module:class."""


@dataclass(frozen=True, config=SETTINGS)
class JournalConfig:
    """Where a run's configuration, metrics, samples and report go besides its folder."""

    trackers: tuple[Text, ...] = ("tensorboard",)
    """Any of tensorboard, wandb (Weights & Biases), mlflow, and `module:class` (docs/extending.md). One that fails
    prints a line and gets nothing more; the run goes on."""

    def __post_init__(self) -> None:
        for tracker in self.trackers:
            require_known("trackers", tracker, TRACKERS)
        require(len(set(self.trackers)) == len(self.trackers), "trackers names one twice; remove it")
