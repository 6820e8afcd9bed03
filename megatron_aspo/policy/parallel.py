"""Megatron's process groups and random seeds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.policy.cpu import cuda as cpu


@dataclass(frozen=True)
class Place:
    """Where a rank is in the layout.

    Attributes:
        dp_rank: of the data-parallel replica that trains on the same streams.
        replica: of the ranks that sample the same responses with the embedded engine.
        routed_layers: its layers with experts, as indices among all those of the model; for `Sample.routes`.
    """

    dp_rank: int
    replica: int
    routed_layers: tuple[int, ...]


def initialize_parallel(config: ParallelConfig, seed: int, gloo: bool = True) -> None:
    """Create Megatron's process groups and seed this rank; torch.distributed must be initialised.

    The data-parallel size is the world size divided by the other sizes. Without a GPU this first makes Megatron-Core
    run on the CPU.

    Args:
        gloo: also create groups over gloo, beside those of a GPU.
    """
    cpu.enable()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor_size,
        create_gloo_process_groups=gloo,
    )
    # Stages of a pipeline hold different layers and must not draw the same weights (from torch's own generator).
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)
