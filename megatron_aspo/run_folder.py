"""Which checkpoints a run's folder holds, and which one to continue from; imports neither torch nor Megatron."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

from megatron_aspo.config import RunConfig
from megatron_aspo.config_file import changes
from megatron_aspo.errors import UserError

STEP_PREFIX = "step_"
PARTIAL_SUFFIX = ".partial"
META_FILE = "meta.json"
"""Written last: a folder without it is not a checkpoint."""
CONFIG_FILE = "config.yaml"
"""In a run's folder: the settings of its newest attempt."""

_OF_AN_ATTEMPT = ("name", "output_dir", "checkpoint.resume")
"""Settings that say where a run lies and how it starts."""


def checkpoints_folder(config: RunConfig) -> Path:
    """Where a run's checkpoints lie."""
    return config.run_dir / "checkpoints"


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    folders = [p for p in root.glob(f"{STEP_PREFIX}*") if p.suffix != PARTIAL_SUFFIX and (p / META_FILE).is_file()]
    return sorted(folders, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name; -1 for another name."""
    number = path.name.removeprefix(STEP_PREFIX)
    return int(number) if number.isdecimal() else -1


def make_folders(config: RunConfig) -> None:
    """The folders a run writes to. Raises UserError where one cannot be made."""
    for name, folder in (("output_dir", config.run_dir), ("warmup.cache_dir", Path(config.warmup.cache_dir))):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{name}: cannot make the folder {folder}: {error.strerror}; choose another") from None


def read_meta(path: Path) -> dict[str, Any]:
    """What is written beside a checkpoint's shards. Raises UserError unless the checkpoint is complete."""
    if not (path / META_FILE).is_file():
        raise UserError(f"{path} is not a complete checkpoint; give the path of a {STEP_PREFIX}... folder")
    try:
        meta = json.loads((path / META_FILE).read_text())
        meta["model"].items()
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path / META_FILE} is damaged; delete the folder and use an older one") from None
    return meta


def changed_settings(resume_from: Path, config: RunConfig) -> list[str]:
    """What is set otherwise than in the last attempt of a checkpoint's run, as "optimizer.lr=2e-06 (was 1e-06)"; empty
    where that run's `config.yaml` cannot be read."""
    import yaml  # imported here so that the command line starts without it

    folder = resume_from.resolve().parent
    if folder.name != checkpoints_folder(config).name:  # a copy of a checkpoint, without its run
        return []
    try:
        before = yaml.safe_load((folder.parent / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    if not isinstance(before, dict):
        return []
    found = changes(typing.cast("dict[str, Any]", before), config)
    return [change for change in found if change.partition("=")[0] not in _OF_AN_ATTEMPT]


def find_resume(config: RunConfig) -> Path | None:
    """The checkpoint to continue training from, as `checkpoint.resume` says; None starts a new run."""
    existing = list_checkpoints(checkpoints_folder(config))
    resume = config.checkpoint.resume
    if resume == "auto":
        return existing[-1] if existing else None
    if resume == "never":
        if existing:
            raise UserError(
                f"{config.run_dir} already has checkpoints; continue with --resume auto, or choose another name=..."
            )
        return None
    missing = {"step", "updates", "layout", "state"} - read_meta(Path(resume)).keys()
    if missing:
        raise UserError(f"{resume} holds weights only, no state to resume from; give the path of a step_... folder")
    return Path(resume)


BASE = "base"
"""Stands for the weights that a run starts from, in place of a checkpoint."""


def find_weights(config: RunConfig, given: str | None) -> Path | None:
    """The checkpoint to evaluate, as `find_checkpoint`; None for `BASE`."""
    return None if given == BASE else find_checkpoint(config, given)


def find_checkpoint(config: RunConfig, given: str | None) -> Path:
    """The given checkpoint, else the run's newest."""
    existing = list_checkpoints(checkpoints_folder(config))
    if given is None and not existing:
        raise UserError(f"no checkpoint under {checkpoints_folder(config)}; train first, or give --checkpoint")
    path = existing[-1] if given is None else Path(given)
    read_meta(path)
    return path
