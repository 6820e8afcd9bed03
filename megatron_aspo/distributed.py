"""The process group of a rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_aspo.config import RunConfig, check_world_size
from megatron_aspo.policy import cpu

TIMEOUT = timedelta(minutes=30)


@contextlib.contextmanager
def distributed(config: RunConfig) -> Iterator[None]:
    """Join the other ranks (NCCL with a GPU each, else gloo) as torchrun's environment says; a lone process makes a
    world of one. Leaves in good order, also on an error.

    Raises:
        UserError: the number of ranks does not fit the configured layout.
    """
    check_world_size(config, int(os.environ.get("WORLD_SIZE", "1")))
    if cpu.enable():
        backend = "gloo"
        # Without a launcher's word each of n ranks on a host gets its n-th part of the cores.
        if "OMP_NUM_THREADS" not in os.environ:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    else:
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT, rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
