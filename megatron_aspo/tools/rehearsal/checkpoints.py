"""Checkpoints of a rehearsed rank: all is done that Megatron does in memory, and only files of tensors are left out.

Importing this changes Megatron-Core for the whole process.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import serialization, state_dict_utils, validation
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, SavePlan
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.futures import Future
from torch.utils._python_dispatch import _disable_current_modes

from megatron_aspo.journal.files import writing
from megatron_aspo.policy import checkpoint
from megatron_aspo.tools.rehearsal.shadows import shadow_of

_objects: dict[str, Any] = {}
_tensors: dict[str, TensorStorageMetadata] = {}
"""This rank's part of the last checkpoint by its keys, tensors without data."""


class _Reader(dcp.StorageReader):
    """Reads what this rank requests: the checkpoint was written at the same layout."""

    requested: dict[str, Any] | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        if self.requested is None:
            return Metadata(_tensors | dict.fromkeys(_objects, BytesStorageMetadata()))
        items = [item for name, value in self.requested.items() for item in _create_write_items(name, value)]
        self._metadata = create_default_global_save_plan([SavePlan(items)])[1]
        return self._metadata

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        """As torch's FileSystemReader: a whole stored shard at a time, in host memory."""
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                content = io.BytesIO()
                with _disable_current_modes():  # beneath a fake mode torch.load would leave the values out
                    torch.save([_objects[name]], content)
                    content.seek(0)
                    planner.load_bytes(item, content)
                continue
            stored = self._metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            chunk = next(chunk for chunk in stored.chunks if chunk.offsets == item.storage_index.offset)
            tensor = torch.empty(chunk.sizes, dtype=stored.properties.dtype)
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                tensor = tensor.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(tensor)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: Any = None) -> None: ...
    def set_up_storage_reader(self, *_: Any, **__: Any) -> None: ...
    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def install() -> None:
    """Leave out the files of tensors, and the checks for which rank 0 needs the other ranks' shards: `files` makes
    them with all ranks' shards."""
    writer: Any = filesystem_async.FileSystemWriterAsync
    strategy: Any = torch_strategy.TorchDistSaveShardedStrategy
    planner: Any = torch_strategy.MCoreSavePlanner
    save, load = strategy.async_save, dcp.load

    def save_objects(self: Any, sharded: Any, *arguments: Any) -> Any:
        _objects.clear()
        _tensors.clear()
        for shard in nested_values(sharded):
            if isinstance(shard, ShardedObject):
                _objects[shard.unique_key] = shard.data
            else:
                properties = TensorProperties(dtype=shard.dtype)
                _tensors[shard.key] = TensorStorageMetadata(properties, torch.Size(shard.global_shape), [])
        return save(self, sharded, *arguments)

    def load_requested(state_dict: Any, storage_reader: Any, **settings: Any) -> None:
        storage_reader.requested = state_dict
        load(state_dict, storage_reader=storage_reader, **settings)

    strategy.async_save = save_objects
    dcp.load = load_requested  # type: ignore[assignment]
    writer.write_preloaded_data_multithread = staticmethod(lambda *_: None)
    writer.retrieve_write_results = lambda self: []
    writer.finish = lambda self, *_: None
    torch_strategy._get_filesystem_reader = serialization._get_filesystem_reader = lambda *_, **__: _Reader()
    planner.create_global_plan = lambda self, plans: (plans, Metadata({}))
    module: Any
    for module in (validation, state_dict_utils):
        module.validate_sharding_integrity = lambda *_, **__: None
    serialization.verify_checkpoint = lambda *_: None
    checkpoint._on_rank_0 = _on_every_rank
    FakeTensor.__reduce_ex__ = _pickled  # type: ignore[assignment]


def _pickled(tensor: Any, protocol: Any) -> Any:
    """Let the scales of FP8 be pickled, as Transformer Engine saves them."""
    if (shadow := shadow_of(tensor)) is not None:
        return functools.partial(torch.tensor, dtype=tensor.dtype), (shadow.tolist(),)
    return functools.partial(torch.zeros, dtype=tensor.dtype), (tuple(tensor.shape),)


def _on_every_rank(path: Any, action: Callable[[], object]) -> None:
    """Write rank 0's small files on the rank that is rehearsed."""
    with writing(path):
        action()
    torch.distributed.broadcast_object_list([None])
