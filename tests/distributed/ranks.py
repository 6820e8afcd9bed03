"""Real ranks for tests, forked from one process that has imported torch and Megatron once.

A rank needs about ten seconds to import and no time to fork, which makes a new world for each test affordable.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import EvalConfig, OptimizerConfig, TrainConfig
from megatron_aspo.errors import UserError
from megatron_aspo.journal.log import read_metrics
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.exchange import deliver
from megatron_aspo.ranks.launch import _die_with_parent, _free_port
from megatron_aspo.ranks.process_group import distributed

_context = multiprocessing.get_context("forkserver")
# A rank would import the last four itself, with its optimizer, its test (pytest: 0.5 s) and its prompts (2 s).
PRELOADED = ["megatron_aspo.commands.train", "torch._dynamo", "megatron.core.models.mimo", "pytest", "reasoning_gym"]
_context.set_forkserver_preload(PRELOADED)

VOCAB = 128

# A step of this size changes no float32 weight of a tiny model, so a test can take many steps from one state.
FROZEN = OptimizerConfig(lr=1e-30, lr_warmup_updates=0, weight_decay=0.0)


def run_config(parallel: ParallelConfig | None = None, **sections: Any) -> RunConfig:
    """Configuration of a model with 25 thousand parameters whose next-token distributions are far from uniform."""
    config = RunConfig(
        name="test",
        model=ModelConfig(hidden_size=32, ffn_hidden_size=64, max_sequence_length=64, init_std=0.3),
        parallel=parallel or ParallelConfig(),
        rollout=RolloutConfig(max_response_tokens=12),
        optimizer=FROZEN,
        train=TrainConfig(max_tokens_per_micro_batch=1024),
    )
    return replace(config, **sections)


def tiny_run(folder: Path, **sections: Any) -> RunConfig:
    """Configuration of a whole run of two-digit sums with that model, in `folder`."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "data": DataConfig(
            task_args={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            prompt_template="{expression} =",
            eval_prompts=4,
        ),
        "rollout": RolloutConfig(prompts_per_step=2, responses_per_prompt=2, max_response_tokens=4),
        "eval": EvalConfig(every=0, responses_per_prompt=1),
    }
    return run_config(**(defaults | sections))


def preload(*modules: str) -> None:
    """Fork ranks from a process that has imported these modules too. Call it before any rank runs.

    Modules that the process cannot import are skipped, such as those on pytest's path only.
    """
    PRELOADED.extend(module for module in modules if module not in PRELOADED)
    _context.set_forkserver_preload(PRELOADED)


def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """Run `function(*args)` on each rank of a new world; return the ranks' results in order.

    Raises:
        AssertionError: if a rank failed or timed out; contains its traceback and output.
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
    """(exit code, output) of each rank of a new world, after all have exited by themselves.

    Raises:
        AssertionError: if a rank timed out; contains the ranks' output.
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


@contextlib.contextmanager
def open_policy(config: RunConfig, weights: Path | None = None) -> Iterator[Policy]:
    """Join the ranks' process group; yield a policy with random weights or those of a checkpoint."""
    with distributed(config):
        policy = Policy(config, VOCAB)
        if weights is not None:
            checkpoint.load_weights(weights, policy)
        yield policy


def hold_writes() -> threading.Event:
    """An event that the files of this rank's later checkpoints wait for."""
    released, write = threading.Event(), FileSystemWriterAsync.write_preloaded_data_multithread

    def write_when_released(*arguments: Any) -> None:
        released.wait()
        write(*arguments)

    setattr(FileSystemWriterAsync, "write_preloaded_data_multithread", staticmethod(write_when_released))  # noqa: B010
    return released


def refusal(config: RunConfig) -> str:
    """The error of building a policy."""
    with pytest.raises(UserError) as caught, open_policy(config):
        pass
    return str(caught.value)


def make_samples() -> list[Sample]:
    """23 samples (not a multiple of any rank count): one has no response, some have advantage 0."""
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    for i in range(23):
        length = 0 if i == 5 else int(rng.integers(1, 15))
        prompt = Prompt(i, "", tuple(rng.integers(VOCAB, size=rng.integers(1, 13)).tolist()), {})
        sample = Sample(prompt, i // 4, rng.integers(VOCAB, size=length).astype(np.int32), "stop")
        sample.advantage = 0.0 if i % 7 == 3 else float(rng.normal())
        sample.rollout_logprobs = rng.normal(-4, 1, length).astype(np.float32)
        samples.append(sample)
    return samples


def everywhere(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with their arrays on every rank. Collective."""
    return deliver(samples, [range(dist.get_world_size())] * len(samples))


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics of a run without its times. Records of checkpoints hold only times and are dropped."""

    def timed(key: str) -> bool:
        return key == "time" or key.startswith("time/") or key.endswith("tokens_per_second")

    records = (record for record in read_metrics(run_dir) if record["phase"] != "checkpoint")
    return [{key: value for key, value in record.items() if not timed(key)} for record in records]


def write_weights(folder: Path, model: ModelConfig) -> None:
    """Write three policies so far apart that their ratios reach every region of the clips."""
    config = run_config(model=model)
    with open_policy(config) as policy:
        generator = torch.Generator().manual_seed(1)
        for name in ("reference", "old", "current"):
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter += 0.08 * torch.randn(parameter.shape, generator=generator)
            checkpoint.save_weights(folder / name, policy)


def full_gradients(policy: Policy) -> dict[str, Tensor]:
    """Full gradients by parameter name, on every rank, after a backward pass and before the optimizer's step."""
    for buffer in policy.model.buffers + policy.model.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:  # after the reduce-scatter only this rank's shard is valid
            local = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_single(bucket.grad_data, local, group=group)
    weights = [parameter.detach().clone() for parameter in policy.model.parameters()]
    assign(policy, [parameter.main_grad for parameter in policy.model.parameters()])
    gradients = full_tensors(policy)
    assign(policy, weights)
    return gradients


@torch.no_grad()
def assign(policy: Policy, weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(policy.model.parameters(), weights, strict=True):
        parameter.copy_(weight)


def gradients_of_steps(policy: Policy) -> list[dict[str, Tensor]]:
    """A list to which each later step of the optimizer appends the full gradients. Call it once."""
    gradients: list[dict[str, Tensor]] = []
    step = policy.optimizer.step

    def step_after_a_look() -> Any:
        gradients.append(full_gradients(policy))
        return step()

    policy.optimizer.step = step_after_a_look
    return gradients


def full_tensors(policy: Policy) -> dict[str, Tensor]:
    """Full parameters by name on every rank, assembled from Megatron's checkpoint map. Replicas must agree."""
    state: dict[str, Any] = policy.model.module.sharded_state_dict()
    apply_factories(state)
    shards: list[Any] = [t for t in nested_values(state) if isinstance(t, ShardedTensor)]
    local = [(t.key, t.global_shape, t.global_slice(), t.data.detach().clone()) for t in shards]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    whole: dict[str, Tensor] = {}
    for key, shape, where, values in itertools.chain(*gathered):
        tensor = whole.setdefault(key, torch.full(shape, torch.nan))
        if not tensor[where].isnan().all():
            torch.testing.assert_close(
                tensor[where], values, rtol=1e-6, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
            )
        tensor[where] = values
    return whole
