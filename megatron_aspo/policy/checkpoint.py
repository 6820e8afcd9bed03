"""Checkpoints with Megatron's dist_checkpointing: written at one layout, read at any other.

A checkpoint is a folder `step_000025`: `meta.json` (step, data position, ...), the model's and optimizer's
shards, `rng/`, the random states of every rank, and `batches.pt` if batches had been sampled ahead.
It is written under another name and renamed when complete, so that a half-written one is never picked up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_aspo.config import ModelConfig
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.run_folder import META_FILE, PARTIAL_SUFFIX, STEP_PREFIX, list_checkpoints, read_meta, step_of
from megatron_aspo.types import Batch

# The one format of the distributed optimizer that can be read at another layout.
_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}

_BATCHES_FILE = "batches.pt"

# Of the model's section, but no property of its weights.
_TRAINING_SETTINGS = ("moe_aux_loss_coef", "moe_z_loss_coef")


def save(
    root: Path, step: int, policy: Policy, state: dict[str, Any], keep: int = 0, batches: Sequence[Batch] = ()
) -> Path:
    """Write `root/step_<step>` and delete all but the `keep` newest (0 keeps all). Collective.

    Args:
        state: JSON-serialisable, the same on every rank; `load` returns it.
        batches: sampled ahead, the same on every rank; `load_batches` returns them.

    Raises:
        RunError: it could not be written.
    """
    final = root / f"{STEP_PREFIX}{step:06d}"
    partial = root / (final.name + PARTIAL_SUFFIX)
    _on_rank_0(lambda: _fresh_folder(partial))
    # Before the first update (every group was dropped so far) the optimizer has no state, and Megatron cannot save it.
    _save_sharded(_sharded_state(policy, with_optimizer=policy.updates > 0), partial)
    with _writing(partial):
        (partial / "rng").mkdir(exist_ok=True)
        torch.save(_rng_state(), partial / "rng" / f"rank{dist.get_rank():05d}.pt")
    meta = {
        "step": step,
        "updates": policy.updates,
        **_model_meta(policy),
        "layout": _layout(policy),
        "state": state,
    }

    def publish() -> None:
        if batches:
            torch.save(list(batches), partial / _BATCHES_FILE)
        _publish(partial, final, meta)
        # A run that went back to an older checkpoint has left the newer ones behind: they are not its future.
        stale = [path for path in list_checkpoints(root) if step_of(path) > step]
        kept = [path for path in list_checkpoints(root) if path not in stale]
        for path in stale + (kept[:-keep] if keep else []):
            shutil.rmtree(path)

    dist.barrier()
    _on_rank_0(publish)
    return final


def load(path: Path, policy: Policy) -> tuple[int, dict[str, Any]]:
    """Read model, optimizer, schedule and random states into `policy`; return (step, state). Collective.

    Hyper-parameters (learning rate, weight decay, ...) are the configuration's, not the checkpoint's. Random
    states are restored when the layout is the one that wrote them.

    Raises:
        UserError: no complete checkpoint at `path`, or one of another model.
    """
    meta = check_same_model(path, policy)
    updated = meta["updates"] > 0
    loaded = _load_sharded(_sharded_state(policy, with_optimizer=updated, is_loading=True), path)
    policy.model.module.load_state_dict(loaded["model"])
    if updated:
        _load_optimizer(policy, loaded["optimizer"])
    else:
        policy.optimizer.reload_model_params()
    policy.scheduler.step(meta["updates"])
    policy.updates = meta["updates"]
    layout = {"expert_tensor": meta["layout"]["tensor"]} | meta["layout"]  # older versions had no other
    if layout == _layout(policy):
        _set_rng_state(torch.load(path / "rng" / f"rank{dist.get_rank():05d}.pt", weights_only=False))
    return meta["step"], meta["state"]


def load_batches(path: Path) -> list[Batch]:
    """The batches that had been sampled ahead when the checkpoint was written.

    Raises:
        UserError: they cannot be read.
    """
    file = path / _BATCHES_FILE
    if not file.is_file():
        return []
    try:
        return torch.load(file, weights_only=False)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read {file}: {reason}; resume from an older checkpoint") from None


def save_weights(path: Path, policy: Policy) -> None:
    """Write the model alone, atomically. Collective."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    _on_rank_0(lambda: _fresh_folder(partial))
    _save_sharded(_sharded_state(policy, with_optimizer=False), partial)
    meta = _model_meta(policy)

    dist.barrier()
    _on_rank_0(lambda: _publish(partial, path, meta))


def load_weights(path: Path, policy: Policy) -> None:
    """Read the model alone, from a checkpoint or from what `save_weights` wrote; the optimizer takes the weights
    over. Collective."""
    check_same_model(path, policy)
    loaded = _load_sharded(_sharded_state(policy, with_optimizer=False), path)
    policy.model.module.load_state_dict(loaded["model"])
    policy.optimizer.reload_model_params()


def _model_meta(policy: Policy) -> dict[str, Any]:
    """What tells whether a checkpoint is of the same model."""
    meta: dict[str, Any] = {"model": dataclasses.asdict(policy.config.model)}
    if policy.config.model.hf_path:
        from megatron_aspo.policy import hf  # takes seconds to import, but has been by now

        meta["hf_config"] = hf.read_config(policy.config.model.hf_path)
    return meta


def check_same_model(path: Path, policy: Policy) -> dict[str, Any]:
    """The `meta.json` of a checkpoint whose model is the policy's.

    Raises:
        UserError: it is another one; the settings that differ are named.
    """
    meta = read_meta(path)
    current = _model_meta(policy)
    # What an older version did not know yet had its default.
    theirs, ours = dataclasses.asdict(ModelConfig()) | meta["model"], current["model"]
    if theirs["hf_path"] and ours["hf_path"]:
        if "hf_config" in meta:  # a folder may move: what counts is what its config.json says
            theirs, ours = (
                {**m, **c, "hf_path": ""} for m, c in ((theirs, meta["hf_config"]), (ours, current["hf_config"]))
            )
        else:
            theirs, ours = (model | {"hf_path": os.path.realpath(model["hf_path"])} for model in (theirs, ours))
    different = [
        key
        for key in sorted(ours.keys() | theirs.keys())
        if theirs.get(key) != ours.get(key) and key not in _TRAINING_SETTINGS
    ]
    if different:
        raise UserError(
            f"{path} was written by another model: {', '.join(f'{k}={theirs.get(k)}' for k in different)}, "
            f"here {', '.join(f'{k}={ours.get(k)}' for k in different)}; use its configuration or another run name"
        )
    return meta


def _sharded_state(policy: Policy, with_optimizer: bool, is_loading: bool = False) -> dict[str, Any]:
    # The state of the unwrapped model: DistributedDataParallel would prefix the names on one side only.
    model = policy.model.module.sharded_state_dict()
    state: dict[str, Any] = {"model": model}
    if with_optimizer:
        for optimizer in _optimizers(policy) if is_loading else []:
            # Loading copies into existing moments; without a step taken there are none yet.
            optimizer._init_optimizer_states_with_dummy_values()
        state["optimizer"] = policy.optimizer.sharded_state_dict(
            dict(model), is_loading=is_loading, metadata=_OPTIMIZER_FORMAT
        )
    return state


def _save_sharded(state: dict[str, Any], path: Path) -> None:
    with _writing(path):
        dist_checkpointing.save(state, str(path))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Megatron's and torch's writers say of a full disk that a worker failed, or that a position is unexpected: what is
    free there is told with it. A rank that is lost, or memory, is no failure to write."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        # The last line: torch's message has the tracebacks of all ranks in it.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        free = shutil.disk_usage(path.parent).free / (1 << 30)
        room = " (make room)" if free < 1 else ""  # the writer's failure may have another cause
        raise RunError(f"cannot write {path}: {reason}; {free:.2f} GiB are free on its disk{room}") from error


def _load_sharded(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        loaded: Any = dist_checkpointing.load(state, str(path))
        return loaded
    except (dist_checkpointing.core.CheckpointingException, CheckpointException, OSError, EOFError) as error:
        # The last line: torch's message has the tracebacks of all ranks in it.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(f"cannot read checkpoint {path}: {reason}; resume from an older one") from None


def _load_optimizer(policy: Policy, state: dict[Any, Any]) -> None:
    """What `DistributedOptimizer.load_state_dict` should do when neither TE nor apex is there.

    Without them torch's AdamW keeps a `step` tensor per parameter. Megatron-Core 0.19.2 restores one tensor that
    all parameters share (each parameter's update then advances it, and the bias correction runs away), and its
    copy of the moments stumbles over `step` being there. So the moments are loaded while `step` is away, and
    every parameter gets a copy of its own.

    With expert parallelism there is an optimizer for the experts too. The moments are found by the names of their
    parameters; of what was saved besides, only the number of steps counts, which all groups of parameters share.
    """
    optimizers = _optimizers(policy)
    saved = state["optimizer"] if "optimizer" in state else state[0]["optimizer"]
    taken = saved["param_groups"][0]["step"]
    for i, optimizer in enumerate(optimizers):
        moments = (state if len(optimizers) == 1 else state[i])["param_state"]
        groups = [group | {"step": taken} for group in optimizer.param_groups]
        optimizer.load_state_dict({"optimizer": {"param_groups": groups}})
        per_parameter = optimizer.optimizer.state.values()
        steps = [s.pop("step", None) for s in per_parameter]
        optimizer.load_parameter_state_from_fully_reshardable(moments)
        for s, step in zip(per_parameter, steps, strict=True):
            if step is not None:
                s["step"] = step.clone()


def _optimizers(policy: Policy) -> Sequence[Any]:
    return getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),  # the CPU generator's where there is no GPU
        "megatron": _megatron_rng().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    _megatron_rng().set_states(state["megatron"])


def _megatron_rng() -> Any:
    return get_cuda_rng_tracker()


def _layout(policy: Policy) -> dict[str, int]:
    parallel = policy.config.parallel
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "expert": parallel.expert,
        "expert_tensor": parallel.expert_tensor_size,
        "data": policy.dp_size,
    }


def _publish(partial: Path, final: Path, meta: dict[str, Any]) -> None:
    """Give a complete checkpoint its name; one that has it already is replaced only then."""
    (partial / META_FILE).write_text(json.dumps(meta, indent=1))
    replaced = final.with_name(final.name + ".replaced" + PARTIAL_SUFFIX)
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)


def _fresh_folder(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _on_rank_0(action: Any) -> None:
    if dist.get_rank() == 0:
        action()
    dist.barrier()
