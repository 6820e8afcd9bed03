"""Batches sampled ahead, in a checkpoint: `batches.pt` holds what all ranks know of them, `batches/rank_00003.pt` the
arrays of a rank's samples. Another number of ranks shares out the files."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_aspo.batch import EVERY_RANK, Batch, Sample
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.journal.files import sync, writing
from megatron_aspo.ranks.exchange import without_arrays
from megatron_aspo.ranks.gathering import gather_objects

_FILE, _FOLDER, _GROUPS_FILE = "batches.pt", "batches", "groups.pt"
_ARRAYS = ("token_ids", "rollout_logprobs", "versions", "routes")


def save_batches(folder: Path, batches: Sequence[Batch]) -> None:
    """Write the batches into a checkpoint's folder. Collective.

    Raises:
        RunError: on every rank, if a rank could not write.
    """
    rank = dist.get_rank()
    own = {
        i: {name: getattr(sample, name) for name in _ARRAYS}
        for i, sample in enumerate(_samples(batches))
        if sample.owner == rank
    }
    failure = ""
    try:
        with writing(folder):
            if rank == 0:
                _write(folder / _FILE, [_without_arrays(batch) for batch in batches])
            if own:
                (folder / _FOLDER).mkdir(exist_ok=True)
                _write(_rank_file(folder, rank), own)
    except RunError as error:
        failure = str(error)
    if failures := list(filter(None, gather_objects(failure))):
        raise RunError(failures[0])


def load_batches(folder: Path) -> list[Batch]:
    """The batches of a checkpoint's folder, with the arrays that this rank owns now.

    Raises:
        UserError: a file cannot be read, or an older version wrote it.
    """
    if not (folder / _FILE).is_file():
        return []
    batches: list[Batch] = _read(folder / _FILE)
    samples = _samples(batches)
    older = any("rollout/staleness" not in batch.metrics for batch in batches)
    if older or any(sample.response_length < 0 for sample in samples):
        raise UserError(
            f"{folder / _FILE} is of an older version of megatron_aspo; continue with that version, or delete the file "
            "to sample its batches again"
        )
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    owners = {owner: i % world for i, owner in enumerate(sorted({sample.owner for sample in samples} - {EVERY_RANK}))}
    arrays: dict[int, dict[str, Any]] = {}
    failure: UserError | None = None  # raised by all ranks
    for before, now in owners.items():
        if now == rank and failure is None:
            try:
                arrays |= _read(_rank_file(folder, before))
            except UserError as error:
                failure = error
    for error in gather_objects(failure):
        if error is not None:
            raise error
    for i, sample in enumerate(samples):
        sample.owner = owners.get(sample.owner, EVERY_RANK)
        for name, array in arrays.get(i, {}).items():
            setattr(sample, name, array)
    return batches


def save_groups(folder: Path, groups: dict[str, Any]) -> None:
    """Write the groups in progress into a checkpoint's folder. Rank 0 calls it."""
    _write(folder / _GROUPS_FILE, groups)


def load_groups(folder: Path) -> dict[str, Any] | None:
    """The groups in progress of a checkpoint's folder, with all arrays; None without any.

    Raises:
        UserError: the file cannot be read.
    """
    return _read(folder / _GROUPS_FILE) if (folder / _GROUPS_FILE).is_file() else None


def _without_arrays(batch: Batch) -> Batch:
    groups = [[s if s.owner == EVERY_RANK else without_arrays(s) for s in group] for group in batch.groups]
    return replace(batch, groups=groups)


def _samples(batches: Sequence[Batch]) -> list[Sample]:
    return [sample for batch in batches for group in batch.groups for sample in group]


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / _FOLDER / f"rank_{rank:05d}.pt"


def _write(file: Path, content: Any) -> None:
    data = io.BytesIO()  # on a full disk torch.save would raise RuntimeError
    torch.save(content, data, pickle_protocol=5)  # older ones take up to 1.5 bytes for each of an array
    file.write_bytes(data.getvalue())  # getbuffer's view in a traceback crashes Python 3.12's garbage collector
    sync(file)  # rank 0, which publishes the checkpoint, may be on another host


def _read(file: Path) -> Any:
    try:
        return torch.load(file, weights_only=False)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read {file}: {reason}; resume from an older checkpoint") from None
