"""All settings of a run. Sections validate their own fields, `checks` across sections. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.fields import SETTINGS, Text
from megatron_aspo.config.fp8 import Fp8Config
from megatron_aspo.config.journal import JournalConfig
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.rewards import RewardConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.rules import require
from megatron_aspo.config.training import CheckpointConfig, EvalConfig, OptimizerConfig, TrainConfig, WarmupConfig

Gpu = Literal["a100", "h100", "h200", "b200"]
"""GPUs whose memory and speed the planner has."""


@dataclass(frozen=True, config=SETTINGS)
class ClusterConfig:
    """The machines that `megatron-aspo plan` plans for. It does not start anything."""

    nodes: PositiveInt = 1
    """Machines."""
    gpus_per_node: PositiveInt = 8
    """GPUs of each machine."""
    gpu: Gpu = "h100"
    """Model of the GPUs."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, config=SETTINGS)
class RunConfig:
    """A whole run."""

    name: Text
    """Name of the run. Its folder is `output_dir/name`."""
    output_dir: Text = "runs"
    """Folder of all runs."""
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 1
    """Seed of initial weights and sampling. Problems have seeds of their own (`data.seed`, `data.eval_seed`)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    journal: JournalConfig = field(default_factory=JournalConfig)
    cluster: ClusterConfig | None = None

    def __post_init__(self) -> None:
        is_folder = self.name not in ("", ".", "..") and "/" not in self.name
        require(is_folder, f"name={self.name!r} must be a folder's name")
        if self.loss.aggregation == "seq-mean-token-sum-norm" and self.loss.norm_length is None:
            loss = replace(self.loss, norm_length=self.rollout.max_response_tokens)
            object.__setattr__(self, "loss", loss)  # the dataclass is frozen

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def init_seed(self) -> int:
        """Seed of the initial weights."""
        return self.seed if self.warmup.seed is None else self.warmup.seed

    @property
    def stream_multiple(self) -> int:
        """Divisor of a packed stream's padded length. Each rank's part of the stream, after context and sequence
        parallelism, is then a multiple of `fp8.multiple`."""
        ranks = self.parallel.context * (self.parallel.tensor if self.parallel.sequence_parallel else 1)
        return math.lcm(self.parallel.stream_multiple, ranks * self.fp8.multiple)

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt, in tokens, that leaves room for the longest response."""
        return self.model.max_sequence_length - self.rollout.max_response_tokens

    @property
    def mini_batches_per_step(self) -> int:
        """Mini-batches of a full rollout batch."""
        return math.ceil(self.rollout.prompts_per_step / self.train.mini_batch_prompts)

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates per rollout batch."""
        return self.mini_batches_per_step * self.train.epochs


def colocated(config: RunConfig) -> RunConfig:
    """Return the configuration without ranks that only generate. Only training uses them."""
    return replace(config, rollout=replace(config.rollout, ranks=0, max_staleness=0, in_flight=False))
