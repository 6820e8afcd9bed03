"""Checkpoints with Megatron's dist_checkpointing: written at one layout, read at any other.

A checkpoint is a folder `step_000025` with `meta.json` (step, data position, ...), the shards of model and optimizer,
and batches that had been sampled ahead (`saved_batches`). It is written under another name and renamed when it is
complete. It has no random states: every draw is seeded by the configuration, its prompt and its purpose.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_aspo.batch import Batch
from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.training import CheckpointConfig
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.journal.files import fresh_folder, partial_path, publish, writing
from megatron_aspo.journal.folder import META_FILE, STEP_PREFIX, abandon, list_checkpoints, read_meta, remove_partial
from megatron_aspo.policy.background import BackgroundWrite
from megatron_aspo.policy.optimizer import has_parameters
from megatron_aspo.policy.saved_batches import save_batches, save_groups
from megatron_aspo.policy.shard_grid import grid_checks
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.gathering import gather_objects
from megatron_aspo.ranks.process_group import warn

_OPTIMIZER_FORMAT = {
    # The distributed optimizer's only format that can be read at another layout.
    "distrib_optim_sharding_type": "fully_reshardable",
    # Data-parallel rank 0 gathers the states in host memory, over gloo. Without this every rank gathers whole float32
    # buffers on its GPU.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}

_ENGINE_STATE = "_extra_state"
"""End of the names of Transformer Engine's FP8 state, one object for each of its layers; empty save with "delayed"."""

# Settings of the section `model` that do not change its weights.
_TRAINING_SETTINGS = ("moe_aux_loss_coef", "moe_z_loss_coef")


class Saver:
    """The checkpoints of a run in `root`, each published when all its files are written. Every method is collective.

    With `checkpoint.asynchronous` training goes on while they are written, one checkpoint at a time.
    """

    def __init__(self, root: Path, config: CheckpointConfig) -> None:
        self._root, self._config = root, config
        self._pending: BackgroundWrite | None = None
        self._is_first = True
        self._times: dict[str, float] = {}

    def save(
        self,
        step: int,
        policy: Policy,
        state: dict[str, Any],
        batches: Sequence[Batch] = (),
        groups: dict[str, Any] | None = None,
        *,
        wait: bool,
    ) -> None:
        """Publish the checkpoint before, then write this one as `save` does; return when it is published if `wait`."""
        self._finish()
        if self._is_first:  # of an attempt that was cut off
            _on_rank_0(self._root, lambda: remove_partial(self._root))
        self._is_first = False
        write = _start_save(self._root, step, policy, state, self._config.keep, batches, groups)
        if wait or not self._config.asynchronous:
            write.finish()
        else:
            self._pending = write

    def published(self) -> dict[str, float]:
        """Publish a complete checkpoint, without waiting. Return the seconds that one published since the last call
        took from its start, as a metric."""
        if self._pending is not None and self._pending.is_done():
            self._finish()
        times, self._times = self._times, {}
        return times

    def _finish(self) -> None:
        if self._pending is not None:
            self._times = {"time/checkpoint_published": self._pending.finish()}
            self._pending = None


def save(
    root: Path,
    step: int,
    policy: Policy,
    state: dict[str, Any],
    keep: int = 0,
    batches: Sequence[Batch] = (),
    groups: dict[str, Any] | None = None,
) -> Path:
    """Write `root/step_<step>` and delete all but the `keep` newest (0 keeps all). Collective.

    Existing checkpoints of this and later steps belong to an abandoned attempt and are renamed, see `abandon`.

    Args:
        state: JSON-serialisable, the same on every rank; `load` returns it.
        batches: sampled ahead, the same on every rank; `saved_batches.load_batches` returns them.
        groups: those in progress, on rank 0; `saved_batches.load_groups` returns them.

    Raises:
        RunError: the checkpoint could not be written.
    """
    _start_save(root, step, policy, state, keep, batches, groups).finish()
    return root / f"{STEP_PREFIX}{step:06d}"


def _start_save(
    root: Path, step: int, policy: Policy, state: dict[str, Any], keep: int, batches: Sequence[Batch], groups: Any
) -> BackgroundWrite:
    path = root / f"{STEP_PREFIX}{step:06d}"
    progress = {"step": step, "weight_version": policy.weight_version, "state": state}

    def finish() -> None:
        abandon(root, step)
        _publish(path, policy, progress)
        for old in list_checkpoints(root)[:-keep] if keep else []:
            shutil.rmtree(old)

    # Before the first update (every group was dropped so far) the optimizer has no state, and Megatron cannot save it.
    write = _save_sharded(path, policy, finish, with_optimizer=policy.weight_version > 0)
    if batches:
        save_batches(partial_path(path), batches)
    if groups is not None:
        _on_rank_0(partial_path(path), lambda: save_groups(partial_path(path), groups))
    return write


def save_weights(path: Path, policy: Policy) -> None:
    """Write the model alone, atomically. Collective."""
    _save_sharded(path, policy, lambda: _publish(path, policy, {}), with_optimizer=False).finish()


def abandon_newer(root: Path, resumed: Path, step: int) -> list[Path]:
    """Rename the checkpoints that are newer than `resumed`, of `step`, from which a run resumes. Collective.

    Returns:
        The new paths, on rank 0; empty on the other ranks.
    """
    renamed: list[Path] = []
    _on_rank_0(root, lambda: renamed.extend(abandon(root, step, resumed)))
    return renamed


def load(path: Path, policy: Policy) -> tuple[int, dict[str, Any]]:
    """Read model, optimizer and schedule into `policy`; return (step, state). Collective.

    Hyper-parameters (learning rate, weight decay, ...) come from the configuration, not from the checkpoint.

    Raises:
        UserError: `path` is no complete checkpoint, or has another model.
    """
    meta = check_same_model(path, policy.config.model)
    updates = meta["weight_version"]
    _load_sharded(path, policy, with_optimizer=updates > 0)
    policy.scheduler.step(updates)
    policy.weight_version = updates
    return meta["step"], meta["state"]


def load_weights(path: Path, policy: Policy) -> None:
    """Read the model alone, from a folder of `save` or `save_weights`, and update the optimizer's copy. Collective."""
    check_same_model(path, policy.config.model)
    _load_sharded(path, policy, with_optimizer=False)


def check_same_model(path: Path, model: ModelConfig) -> dict[str, Any]:
    """Return the `meta.json` of a checkpoint.

    Raises:
        UserError: the checkpoint has another model; the message names the settings that differ.
    """
    meta = read_meta(path)
    saved, current = _model_settings(meta), _model_settings(_model_meta(model))
    different = [key for key in sorted(saved.keys() | current.keys()) if saved.get(key) != current.get(key)]
    if different:
        raise UserError(
            f"{path} was written by another model: {', '.join(f'{k}={saved.get(k)}' for k in different)}, "
            f"here {', '.join(f'{k}={current.get(k)}' for k in different)}; use its configuration or another run name"
        )
    return meta


def _model_meta(model: ModelConfig) -> dict[str, Any]:
    """Entries of `meta.json` that describe the model."""
    meta: dict[str, Any] = {"model": dataclasses.asdict(model)}
    if model.hf_path:
        from megatron_aspo.policy.hf import bridge  # takes seconds to import, and has been imported with the model

        meta["hf_config"] = bridge.read_config(model.hf_path)
    return meta


def _model_settings(meta: dict[str, Any]) -> dict[str, Any]:
    """Settings that determine the weights; a Hugging Face folder counts by its config.json, because it may move."""
    # A checkpoint written before a setting existed has the setting's default.
    settings = dataclasses.asdict(ModelConfig()) | meta["model"] | meta.get("hf_config", {})
    hf_path = bool(meta["model"]["hf_path"])
    return {key: value for key, value in settings.items() if key not in _TRAINING_SETTINGS} | {"hf_path": hf_path}


def _on_rank_0(path: Path, action: Callable[[], object]) -> None:
    """Run `action`, which writes `path`, on rank 0; the other ranks wait. Collective.

    Raises:
        RunError: on every rank, if it failed.
    """
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            with writing(path):
                action()
        except RunError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise RunError(failure[0])


def _publish(path: Path, policy: Policy, meta: dict[str, Any]) -> None:
    meta |= _model_meta(policy.config.model)
    (partial_path(path) / META_FILE).write_text(json.dumps(meta, indent=1))
    publish(path)


def _sharded_state(policy: Policy, with_optimizer: bool, is_loading: bool) -> dict[str, Any]:
    # The states of the unwrapped chunks: DistributedDataParallel would prefix the names on one side only. Shards have
    # the layers' numbers in the whole model, whatever chunk they are in.
    model = {str(i): chunk.module.sharded_state_dict() for i, chunk in enumerate(policy.whole_chunks())}
    if not with_optimizer:
        return {"model": model}
    optimizer = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT)
    return {"model": model, "optimizer": optimizer}


def _save_sharded(path: Path, policy: Policy, finish: Callable[[], None], with_optimizer: bool) -> BackgroundWrite:
    """Start to write the shards. `finish` is called on rank 0 when all of them are complete."""
    partial = partial_path(path)
    _on_rank_0(partial, lambda: fresh_folder(partial))
    live = [t for chunk in policy.chunks for t in (*chunk.module.parameters(), *chunk.module.buffers())]
    with writing(partial, CheckpointException), grid_checks():
        request = dist_checkpointing.save(
            _sharded_state(policy, with_optimizer, is_loading=False),
            str(partial),
            async_sharded_save=True,
            async_strategy="mcore",
        )
    return BackgroundWrite(request, partial, live, lambda: _on_rank_0(partial, finish))


def _load_sharded(path: Path, policy: Policy, with_optimizer: bool) -> None:
    """Load the weights, and either the optimizer's state or its copy of the weights."""
    for optimizer in policy.optimizer.chained_optimizers if with_optimizer else []:
        # Loading copies into existing moments, which the first update creates.
        optimizer._init_optimizer_states_with_dummy_values()
    state = _sharded_state(policy, with_optimizer, is_loading=True)
    try:
        with grid_checks():
            loading: Any = dist_checkpointing.load(state, str(path), strict=StrictHandling.RETURN_UNEXPECTED)
        loaded, _, absent = loading
    except (dist_checkpointing.core.CheckpointingException, CheckpointException, OSError, EOFError) as error:
        # The last line: torch's message contains the tracebacks of all ranks.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(f"cannot read checkpoint {path}: {reason}; resume from an older one") from None
    # Local layers, those of a run on a CPU, have no `_extra_state`.
    everywhere = set[str]().union(*gather_objects(absent))
    if lacking := sorted(key for key in everywhere if not key.endswith(_ENGINE_STATE)):
        raise UserError(f"checkpoint {path} lacks {lacking[0]}; resume from another one, or start a new run")
    states = (v for state in loaded["model"].values() for name, v in state.items() if name.endswith(_ENGINE_STATE))
    if policy.config.fp8.recipe == "delayed" and not any(torch.is_tensor(s) and s.numel() for s in states):
        warn(f"{path} has no scales of fp8.recipe=delayed; they start at 1, so the first pass rounds coarsely")
    # Transformer Engine's `_extra_state`, the scales of fp8.recipe=delayed, is pickled. It is unpickled only with this
    # variable. Checkpoints are trusted: their batches are unpickled too.
    os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"
    for i, chunk in enumerate(policy.chunks):
        chunk.module.load_state_dict(loaded["model"][str(i)], strict=not everywhere)
    if with_optimizer:
        _load_optimizer(policy, loaded["optimizer"])
    else:
        policy.optimizer.reload_model_params()


def _load_optimizer(policy: Policy, state: dict[Any, Any]) -> None:
    """Load the optimizer's state, with a separate `step` for each parameter.

    Without Transformer Engine and apex, torch's AdamW keeps a `step` tensor per parameter. Megatron-Core 0.19.2
    restores one tensor that all parameters share: each parameter's update advances it, and the bias correction is
    wrong. Its copy of the moments fails if `step` is present. Therefore moments are loaded without `step`, and every
    parameter gets a copy.

    With expert parallelism a second optimizer has the experts. Moments are found by the names of their parameters. All
    groups of parameters share the number of steps. A pipeline stage without experts has no parameters in the second.
    """
    optimizers = policy.optimizer.chained_optimizers
    saved = state["optimizer"] if "optimizer" in state else state[0]["optimizer"]
    taken = saved["param_groups"][0]["step"]
    for i, optimizer in enumerate(optimizers):
        if not has_parameters(optimizer):
            continue
        moments = (state if len(optimizers) == 1 else state[i])["param_state"]
        groups = [group | {"step": taken} for group in optimizer.param_groups]
        optimizer.load_state_dict({"optimizer": {"param_groups": groups}})
        per_parameter = optimizer.optimizer.state.values()
        steps = [s.pop("step", None) for s in per_parameter]
        optimizer.load_parameter_state_from_fully_reshardable(moments)
        for s, step in zip(per_parameter, steps, strict=True):
            if step is not None:
                s["step"] = step.clone()
        if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
            # It keeps slices of what was loaded, which would hold the states of all data-parallel ranks in host memory.
            for s in per_parameter:
                s.update({name: value.clone() for name, value in s.items() if torch.is_tensor(value)})
            # Before every update it overwrites the groups of its parts, on GPU and CPU, with its own. FusedAdam counts
            # updates there, so its bias correction would stay at the checkpoint's step. The parts have their counts.
            for group in optimizer.optimizer.param_groups:
                group.pop("step", None)
