"""The process group of a rank."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_aspo.channel import ROLES, Channel
from megatron_aspo.config import RunConfig
from megatron_aspo.config_checks import check_world_size
from megatron_aspo.errors import RunError
from megatron_aspo.policy import cpu

TIMEOUT = timedelta(minutes=30)


@contextlib.contextmanager
def distributed(config: RunConfig) -> Iterator[Channel | None]:
    """Join the other ranks (NCCL with a GPU each, else gloo) as torchrun's environment says; a lone process makes a
    world of one. Leaves in good order, also on an error.

    With `rollout.ranks` the last ranks have a default process group of their own, the rollout ranks', and the others
    the training ranks'; what is yielded then is the channel between the two.

    Raises:
        UserError: the number of ranks does not fit the configured layout.
        RunError: the ranks do not find each other.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check_world_size(config, world_size)
    training = world_size - config.rollout.ranks
    role = ROLES[rank >= training]
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        backend = "gloo"
        if role == "training":  # the others have no part of Megatron's
            cpu.enable()
        # Without a launcher's word each of n ranks on a host gets its n-th part of the cores.
        if "OMP_NUM_THREADS" not in os.environ:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    channel = None
    with _coming_together(world_size):
        if config.rollout.ranks:
            store, *_ = next(rendezvous("env://", timeout=TIMEOUT))
            place, size = (rank, training) if role == "training" else (rank - training, config.rollout.ranks)
            dist.init_process_group(
                backend, timeout=TIMEOUT, rank=place, world_size=size, store=dist.PrefixStore(role, store)
            )
            channel = Channel(role, store)
        elif "RANK" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, timeout=TIMEOUT, rank=0, world_size=1, store=dist.HashStore())
    try:
        yield channel
        if channel is not None:
            channel.close()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _coming_together(world_size: int) -> Iterator[None]:
    try:
        yield
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"the {world_size} ranks did not find each other at MASTER_ADDR:MASTER_PORT = {where} "
            f"({str(error).splitlines()[0].rstrip('.')}); start all of them with the same two, on a port that is free "
            "and that the other nodes reach"
        ) from error


def warn(message: str) -> None:
    """A line for the user, from the first rank."""
    if dist.get_rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)
