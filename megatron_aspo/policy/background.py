"""The files of a checkpoint, written by a thread while training goes on.

Megatron's own background writers are processes. A forked one keeps the rank's sockets open, so the other ranks do not
notice that the rank was killed, and it goes on writing into the folder that the resumed run uses. A spawned one imports
torch again on every rank, takes a CUDA context, and gets the optimizer's states through /dev/shm. A thread ends with
its rank, and torch writes tensors without Python's lock.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_aspo.journal.files import writing

# In place of Megatron's queue between processes, for which every rank spawns a helper: it imports torch again, takes
# 0.5 GB, and outlives a killed rank.
setattr(filesystem_async, "_results_queue", queue.Queue())  # noqa: B010  (private name of another library)
# Megatron stops the garbage collector while it writes, here for the whole of training, unless it finds it stopped.
setattr(async_utils, "gc", SimpleNamespace(isenabled=lambda: False))  # noqa: B010


class BackgroundWrite:
    """Writes the shards of all ranks into the folder `path`. The constructor has copied them when it returns.

    Args:
        request: returned by `dist_checkpointing.save` with `async_sharded_save`.
        live: tensors that training changes. Those in host memory are copied; Megatron copies only others.
        publish: called when the folder is complete. Collective.
    """

    def __init__(self, request: Any, path: Path, live: Iterable[Tensor], publish: Callable[[], None]) -> None:
        self._path, self._start = path, time.perf_counter()
        self._finalize: list[Callable[[], None]] = request.finalize_fns
        self._publish = publish
        if request.async_fn is not None:  # None on a rank without shards
            changing = {_storage(tensor) for tensor in live if tensor.device.type == "cpu"}
            buckets = request.async_fn_args[1]
            buckets[:] = request.preload_fn()  # in place: the finalize functions have this list, of device tensors
            for _, _, (_, tensors) in buckets:
                tensors[:] = [(item, t.clone() if _storage(t) in changing else t) for item, t in tensors]
        write: Callable[..., None] = request.async_fn or (lambda: None)
        # No daemon: one that is inside torch when Python ends would abort the process, whose exit code tells the cause.
        self._thread = threading.Thread(target=write, args=request.async_fn_args)
        self._thread.start()

    def is_done(self) -> bool:
        """Whether all ranks have written their files. Collective."""
        unfinished = torch.tensor(int(self._thread.is_alive()))
        dist.all_reduce(unfinished, op=dist.ReduceOp.MAX)
        return not unfinished

    def finish(self) -> float:
        """Wait for the files, publish them, and return the seconds since the constructor was called. Collective.

        Raises:
            RunError: a rank could not write its files.
        """
        while not self.is_done():
            self._thread.join(60)  # shorter than the process group's timeout, which a slow disk must not reach
        with writing(self._path, CheckpointException):
            for finalize in self._finalize:
                finalize()
        self._publish()
        return time.perf_counter() - self._start


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
