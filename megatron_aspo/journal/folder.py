"""Checkpoints in a run's folder: which are complete, which one to continue from. Imports neither torch nor Megatron."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from megatron_aspo.config.load import changes
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.journal.files import PARTIAL_SUFFIX, remove

STEP_PREFIX = "step_"
META_FILE = "meta.json"
"""Part of every complete checkpoint."""
CONFIG_FILE = "config.yaml"
"""Settings of a run's newest attempt, in the run's folder."""

BASE = "base"
"""Stands for a run's initial weights, in place of a checkpoint."""

_SETTINGS_OF_ATTEMPTS = ("name", "output_dir", "checkpoint.resume")
"""Settings that differ between attempts of one run."""


def checkpoints_folder(config: RunConfig) -> Path:
    return config.run_dir / "checkpoints"


def list_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints under `root`, oldest first, without partial and abandoned ones, and without those
    whose `meta.json` is empty: their host went down before it was on the disk."""
    folders = [p for p in root.glob(f"{STEP_PREFIX}*") if step_of(p) >= 0 and _size(p / META_FILE) > 0]
    return sorted(folders, key=step_of)


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def remove_partial(root: Path) -> None:
    """Delete the checkpoints under `root` that an earlier attempt did not complete."""
    for path in root.glob(f"{STEP_PREFIX}*{PARTIAL_SUFFIX}"):
        if step_of(path.with_suffix("")) >= 0:
            remove(path)


def abandon(root: Path, step: int, kept: Path | None = None) -> list[Path]:
    """Rename the checkpoints from `step` on, except `kept`, to `step_<n>.abandoned-<i>`; return the new paths.

    They are left over when a run resumes from an older checkpoint.
    """
    renamed: list[Path] = []
    for path in list_checkpoints(root):
        if step_of(path) >= step and not (kept and path.samefile(kept)):
            numbered = (path.with_name(f"{path.name}.abandoned-{i}") for i in itertools.count(1))
            renamed.append(path.rename(next(name for name in numbered if not name.exists())))
    return renamed


def step_of(path: Path) -> int:
    """Return the step in a checkpoint folder's name; -1 for another name."""
    number = path.name.removeprefix(STEP_PREFIX)
    return int(number) if number.isdecimal() else -1


def make_folders(config: RunConfig) -> None:
    """Make the folders that a run writes to; UserError if one cannot be made."""
    for name, folder in (("output_dir", config.run_dir), ("warmup.cache_dir", Path(config.warmup.cache_dir))):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{name}: cannot make the folder {folder}: {error.strerror}; choose another") from None


def read_meta(path: Path) -> dict[str, Any]:
    """Return a checkpoint's `meta.json`; UserError unless the checkpoint is complete."""
    if not (path / META_FILE).is_file():
        raise UserError(f"{path} is not a complete checkpoint; give the path of a {STEP_PREFIX}... folder")
    try:
        meta = json.loads((path / META_FILE).read_text())
        meta["model"].items()
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path / META_FILE} is damaged; delete the folder and use an older one") from None
    return meta


def changed_settings(resume_from: Path, config: RunConfig) -> list[str]:
    """Return the settings that differ from the last attempt of a checkpoint's run, as "optimizer.lr=2e-06 (was 1e-06)".

    The list is empty if that run's `config.yaml` cannot be read.
    """
    import yaml  # imported here so that the command line starts without it

    folder = resume_from.resolve().parent
    if folder.name != checkpoints_folder(config).name:  # a copy of a checkpoint, without its run
        return []
    try:
        before = yaml.safe_load((folder.parent / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    changed = changes(before, config) if isinstance(before, dict) else ()
    return [change for change in changed if change.partition("=")[0] not in _SETTINGS_OF_ATTEMPTS]


def find_resume(config: RunConfig) -> Path | None:
    """Return the checkpoint to continue from, according to `checkpoint.resume`; None for a new run."""
    existing = list_checkpoints(checkpoints_folder(config))
    resume = config.checkpoint.resume
    if resume == "never" and existing:
        raise UserError(
            f"{config.run_dir} already has checkpoints; continue with --resume auto, or choose another name=..."
        )
    if resume == "never" or (resume == "auto" and not existing):
        return None
    path = existing[-1] if resume == "auto" else Path(resume)
    if missing := {"step", "weight_version", "state"} - read_meta(path).keys():
        raise UserError(
            f"{path} holds no state to resume from, weights only or that of an older version (its {META_FILE} has no "
            f"{', '.join(sorted(missing))}); give the path of another {STEP_PREFIX}... folder"
        )
    return path


def find_weights(config: RunConfig, requested: str | None) -> Path | None:
    """Return the checkpoint to evaluate, as `find_checkpoint`; None for `BASE`."""
    return None if requested == BASE else find_checkpoint(config, requested)


def find_checkpoint(config: RunConfig, requested: str | None) -> Path:
    """Return the requested checkpoint, or the run's newest if `requested` is None."""
    existing = list_checkpoints(checkpoints_folder(config))
    if requested is None and not existing:
        raise UserError(f"no checkpoint under {checkpoints_folder(config)}; train first, or give --checkpoint")
    path = existing[-1] if requested is None else Path(requested)
    read_meta(path)
    return path
