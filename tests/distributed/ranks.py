"""Real ranks for tests: forked from one process that has imported torch and Megatron once.

Importing takes a rank about ten seconds, forking none; so each test has a world of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from megatron_aspo.config import ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig, RunConfig, TrainConfig
from megatron_aspo.distributed import distributed
from megatron_aspo.launch import _die_with_parent, _free_port
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.types import Prompt, Sample

_context = multiprocessing.get_context("forkserver")
PRELOADED = ["megatron_aspo.train", "torch._dynamo"]  # the latter is imported with the first optimizer
_context.set_forkserver_preload(PRELOADED)

VOCAB = 128

# No weight of a tiny model in float32 moves by a step of this size, so a test can take many from one state.
FROZEN = OptimizerConfig(lr=1e-30, lr_warmup_updates=0, weight_decay=0.0)


def run_config(parallel: ParallelConfig | None = None, **sections: Any) -> RunConfig:
    """A model of 25 thousand parameters whose next-token distributions are far from uniform."""
    config = RunConfig(
        name="test",
        model=ModelConfig(hidden_size=32, ffn_hidden_size=64, max_sequence_length=64, init_std=0.3),
        parallel=parallel or ParallelConfig(),
        rollout=RolloutConfig(max_response_tokens=12),
        optimizer=FROZEN,
        train=TrainConfig(max_tokens_per_micro_batch=1024),
    )
    return replace(config, **sections)


def preload(*modules: str) -> None:
    """Have ranks forked from a process that has imported these too; to be called before any rank runs. It does not
    import what only pytest finds, and says nothing of what it cannot import."""
    PRELOADED.extend(module for module in modules if module not in PRELOADED)
    _context.set_forkserver_preload(PRELOADED)


def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` on each rank of a new world; what the ranks returned, in order.

    Raises:
        AssertionError: with the rank's traceback and output, if one failed or did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder, _world(world_size, Path(folder), function, args) as processes:
        deadline = time.monotonic() + timeout
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            assert time.monotonic() < deadline, f"no result after {timeout} s\n{_outputs(folder)}"
            time.sleep(0.02)
        assert not any(p.exitcode for p in processes), _outputs(folder)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def ends(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240
) -> list[tuple[int | None, str]]:
    """(exit code, output) of each rank of a new world, when all have ended by themselves.

    Raises:
        AssertionError: with the ranks' output, if one did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder, _world(world_size, Path(folder), function, args) as processes:
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        assert not any(p.is_alive() for p in processes), f"no end after {timeout} s\n{_outputs(folder)}"
        return [(p.exitcode, (Path(folder) / f"{rank}.txt").read_text()) for rank, p in enumerate(processes)]


@contextlib.contextmanager
def _world(world_size: int, folder: Path, function: Callable[..., Any], args: Any) -> Iterator[list[Any]]:
    arguments = (world_size, _free_port(), folder, function, args)
    processes = [_context.Process(target=_rank, args=(rank, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(rank: int, world_size: int, port: int, folder: Path, function: Callable[..., Any], args: Any) -> None:
    _die_with_parent()
    output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.save(function(*args), folder / f"{rank}.pt")


def _outputs(folder: str) -> str:
    texts = ((path.stem, path.read_text()) for path in sorted(Path(folder).glob("*.txt")))
    return "".join(f"--- rank {rank}\n{text[-20000:]}\n" for rank, text in texts)


def make_samples() -> list[Sample]:
    """23 samples (no multiple of a rank count), one of them without a response, some with advantage 0."""
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    for i in range(23):
        length = 0 if i == 5 else int(rng.integers(1, 15))
        prompt = Prompt(i, "", tuple(rng.integers(VOCAB, size=rng.integers(1, 13)).tolist()), {})
        sample = Sample(prompt, i // 4, tuple(rng.integers(VOCAB, size=length).tolist()), "stop")
        sample.advantage = 0.0 if i % 7 == 3 else float(rng.normal())
        sample.rollout_logprobs = rng.normal(-4, 1, length).astype(np.float32)
        samples.append(sample)
    return samples


def write_weights(folder: Path, model: ModelConfig) -> None:
    """Three policies so far apart that their ratios reach every region of the clips."""
    config = run_config(model=model)
    with distributed(config):
        policy = Policy(config, VOCAB)
        generator = torch.Generator().manual_seed(1)
        for name in ("reference", "old", "current"):
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter += 0.08 * torch.randn(parameter.shape, generator=generator)
            checkpoint.save_weights(folder / name, policy)


def full_gradients(policy: Policy) -> dict[str, Tensor]:
    """Gradients of whole parameters by name, on every rank, after a backward pass and before the optimizer's step."""
    for buffer in policy.model.buffers + policy.model.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:  # the reduce-scatter left this rank's part valid
            mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_single(bucket.grad_data, mine, group=group)
    weights = [parameter.detach().clone() for parameter in policy.model.parameters()]
    policy._assign([parameter.main_grad for parameter in policy.model.parameters()])
    gradients = full_tensors(policy)
    policy._assign(weights)
    return gradients


def gradients_of_steps(policy: Policy) -> list[dict[str, Tensor]]:
    """A list that each further step of the optimizer adds the whole parameters' gradients to. Call it once."""
    gradients: list[dict[str, Tensor]] = []
    step = policy.optimizer.step

    def step_after_a_look() -> Any:
        gradients.append(full_gradients(policy))
        return step()

    policy.optimizer.step = step_after_a_look
    return gradients


def full_tensors(policy: Policy) -> dict[str, Tensor]:
    """Whole parameters by name, put together on every rank as Megatron's own checkpoint map says.

    What several ranks hold must be the same on all of them.
    """
    state: dict[str, Any] = policy.model.module.sharded_state_dict()
    apply_factories(state)
    shards: list[Any] = [t for t in nested_values(state) if isinstance(t, ShardedTensor)]
    mine = [(t.key, t.global_shape, t.global_slice(), t.data.detach().clone()) for t in shards]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    whole: dict[str, Tensor] = {}
    for key, shape, where, values in itertools.chain(*everyones):
        tensor = whole.setdefault(key, torch.full(shape, torch.nan))
        if not tensor[where].isnan().all():
            torch.testing.assert_close(
                tensor[where], values, rtol=1e-6, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
            )
        tensor[where] = values
    return whole
