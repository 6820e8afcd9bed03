"""Which checkpoints a run's folder holds, and which one to continue from; imports neither torch nor Megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_aspo.config import RunConfig
from megatron_aspo.errors import UserError

STEP_PREFIX = "step_"
PARTIAL_SUFFIX = ".partial"
META_FILE = "meta.json"
"""Written last: a folder without it is not a checkpoint."""


def checkpoints_folder(config: RunConfig) -> Path:
    """Where a run's checkpoints lie."""
    return config.run_dir / "checkpoints"


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    folders = root.glob(f"{STEP_PREFIX}*")
    return sorted(p for p in folders if p.suffix != PARTIAL_SUFFIX and (p / META_FILE).is_file())


def read_meta(path: Path) -> dict[str, Any]:
    """What is written beside a checkpoint's shards. Raises UserError unless the checkpoint is complete."""
    if not (path / META_FILE).is_file():
        raise UserError(f"{path} is not a complete checkpoint; give the path of a {STEP_PREFIX}... folder")
    try:
        return json.loads((path / META_FILE).read_text())
    except ValueError:
        raise UserError(f"{path / META_FILE} is damaged; delete the folder and use an older one") from None


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
    read_meta(Path(resume))
    return Path(resume)


def find_checkpoint(config: RunConfig, given: str | None) -> Path:
    """The checkpoint to evaluate: the given one, else the run's newest."""
    existing = list_checkpoints(checkpoints_folder(config))
    if given is None and not existing:
        raise UserError(f"no checkpoint under {checkpoints_folder(config)}; train first, or give --checkpoint")
    path = existing[-1] if given is None else Path(given)
    read_meta(path)
    return path
