"""A rehearsed rank's memory against bytes of real tensors: the same phases by Transformer Engine's Python on this CPU,
and on fake tensors.

A CPU has one memory, so the rehearsal counts device and host together. A CPU fuses no functions, so the rehearsal does
not either. Kernels take no working memory in both: on the CPU what a function of the reference allocates is counted
when it returns. cuBLAS's workspace, most of a tiny model's memory, is left out.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import te_ranks
import torch
from ranks import VOCAB, run_config

from benchmarks.counting import Count
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import OptimizerConfig, TrainConfig
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.tools.planning.gpus import KNOWN
from megatron_aspo.tools.rehearsal.run import Job

pytestmark = [pytest.mark.distributed, pytest.mark.slow, te_ranks.needs_te]

MODEL = replace(
    run_config().model,
    dtype="bfloat16",
    num_layers=2,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=8,
    num_query_groups=4,
    max_sequence_length=128,
)
EXPERTS = replace(MODEL, num_experts=4, moe_top_k=2, moe_ffn_hidden_size=256)
TRAIN = TrainConfig(max_tokens_per_micro_batch=1024, release_gradients=True)
CONFIGS = {
    "dense, TP 2": run_config(
        ParallelConfig(tensor=2, sequence_parallel=True), model=MODEL, train=TRAIN, optimizer=OptimizerConfig()
    ),
    "experts, EP 2": run_config(
        ParallelConfig(expert=2), model=EXPERTS, train=replace(TRAIN, recompute="full"), optimizer=OptimizerConfig()
    ),
}
PHASES = ("build", "old log-probs", "first update", "update", "release gradients", "checkpoint save")
Bytes = dict[str, tuple[int, int]]
"""Phase -> (peak, end)."""


def job_of(config: RunConfig) -> Job:
    return Job(config, 0, 2, VOCAB, 2, KNOWN["h100"], resume=False)


class Measured(Count):
    """Phases of real tensors. A function of Transformer Engine's extension is one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: Bytes = {}
        resize: Any = torch.UntypedStorage.resize_

        def resize_and_count(storage: Any, size: int) -> Any:
            self.live += size - storage.nbytes()  # gradients are freed so
            return resize(storage, size)

        setattr(torch.UntypedStorage, "resize_", resize_and_count)  # noqa: B010
        gemm: Any = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
        gemm.get_cublas_workspace_size_bytes = lambda: 0
        for module in [module for name, module in sys.modules.items() if name.startswith("transformer_engine")]:
            for name, function in list(vars(module).items()):  # some modules import kernels by name
                if isinstance(function, types.FunctionType) and function.__module__.startswith("te_reference."):
                    setattr(module, name, self._one_kernel(function))
        gc.collect()
        gc.freeze()  # phases search for cycles; modules take most of that time and have none

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.topk.default and out[1].dim() == 2:  # a router's choice, balanced as in a rehearsal
            out[1].copy_((torch.arange(out[1].numel()) % args[0].shape[-1]).view(out[1].shape))
        return out

    def _one_kernel(self, kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.peak
            out = kernel(*args, **kwargs)
            self.peak = max(before, self.live)
            return out

        return call

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        gc.collect()
        self.peak = self.live
        yield
        gc.collect()
        self.phases[name] = self.peak, self.live


def measure(config: RunConfig, folder: Path, planted: bool) -> Bytes:
    """Phases of this rank with real tensors."""
    from megatron_aspo.tools.rehearsal.phases import Phases

    with distributed(config), Measured() as memory:
        if planted:
            _retain_an_input()
        Phases(replace(job_of(config), save=not planted), cast(Any, memory), folder).run()
    return memory.phases


def _retain_an_input() -> None:
    """Keep what enters each layer in the last update, as a forgotten attribute would."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    forward: Any = TransformerLayer.forward

    def keeping(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self.kept = hidden_states
        return forward(self, hidden_states, *args, **kwargs)

    TransformerLayer.forward = keeping


@pytest.fixture(scope="module")
def rehearsed() -> dict[str, Bytes]:
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (te_ranks.PYTHON, here, here.parent, here.parent.parent)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "rehearse_one_memory"]
    jobs = pickle.dumps([job_of(config) for config in CONFIGS.values()])
    done = subprocess.run(command, input=jobs, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return dict(zip(CONFIGS, pickle.loads(done.stdout.split(b"\n", 1)[1]), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_rehearsed_bytes_are_measured_bytes(name: str, rehearsed: dict[str, Bytes], tmp_path: Path) -> None:
    measured = te_ranks.run(2, measure, CONFIGS[name], tmp_path, False)[0]
    for phase in PHASES:
        (peak, end), (real_peak, real_end) = rehearsed[name][phase], measured[phase]
        assert end == pytest.approx(real_end, rel=1e-4), phase
        assert peak == pytest.approx(real_peak, rel=1e-4), phase


def test_a_retained_tensor_is_measured(rehearsed: dict[str, Bytes], tmp_path: Path) -> None:
    name = "dense, TP 2"
    measured = te_ranks.run(2, measure, CONFIGS[name], tmp_path, True)[0]
    inputs = MODEL.num_layers * TRAIN.max_tokens_per_micro_batch // 2 * MODEL.hidden_size * 2
    assert measured["update"][1] - rehearsed[name]["update"][1] == pytest.approx(inputs, rel=0.01)
    assert inputs > 0.03 * rehearsed[name]["update"][1]
