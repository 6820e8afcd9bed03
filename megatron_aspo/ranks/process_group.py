"""The process group of a rank."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_aspo.config.checks import check_world_size
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.ranks.channel import ROLES, Channel
from megatron_aspo.ranks.gathering import share_ranks

TIMEOUT = timedelta(minutes=30)


@contextlib.contextmanager
def distributed(config: RunConfig) -> Iterator[Channel | None]:
    """Initialise the default process group from torchrun's environment variables, and destroy it at the end.

    Backends are NCCL with one GPU per rank, otherwise gloo. Without the variables the world has one rank. With
    `rollout.ranks` the last ranks form the rollout ranks' default process group, and the others the training ranks'.

    Yields:
        The channel between training and rollout ranks; None without `rollout.ranks`.

    Raises:
        UserError: the number of ranks does not fit the configured layout or this host's GPUs.
        RunError: the ranks cannot reach each other.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check_world_size(config.parallel, config.rollout, world_size)
    group: dict[str, Any] = {"backend": "gloo", "timeout": TIMEOUT}
    if torch.cuda.is_available():
        group["backend"] = "cpu:gloo,cuda:nccl"
        local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if local > gpus:
            raise UserError(
                f"{local} ranks on this host need a GPU each, and it has {gpus}; start fewer (--nproc, parallel.*), or "
                "set CUDA_VISIBLE_DEVICES to nothing to run on the CPU"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif "OMP_NUM_THREADS" not in os.environ:  # split the host's cores among its ranks
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    channel = None
    limit = timedelta(hours=config.train.wait_limit_hours)
    with _rendezvous_errors(world_size):
        if config.rollout.ranks:
            training = world_size - config.rollout.ranks
            ranks, others = range(training), range(training, world_size)
            if rank >= training:
                ranks, others = others, ranks
            role = ROLES[rank >= training]
            store, *_ = next(rendezvous("env://", timeout=TIMEOUT))
            group["store"] = dist.PrefixStore(role, store)
            dist.init_process_group(**group, rank=ranks.index(rank), world_size=len(ranks))
            share_ranks(limit, store, ranks.start)
            channel = Channel(role, store, others)
        elif "RANK" in os.environ:
            dist.init_process_group(**group)
            share_ranks(limit)
        else:
            dist.init_process_group(**group, rank=0, world_size=1, store=dist.HashStore())
    try:
        yield channel
        if channel is not None:
            channel.close()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _rendezvous_errors(world_size: int) -> Iterator[None]:
    try:
        yield
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"the {world_size} ranks did not find each other at MASTER_ADDR:MASTER_PORT = {where} "
            f"({str(error).splitlines()[0].rstrip('.')}); start all ranks with the same two, and with a port that is "
            "free and open to the other nodes"
        ) from error


def warn(message: str) -> None:
    """Print a warning on the first rank."""
    if dist.get_rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)
