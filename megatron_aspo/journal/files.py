"""Files and folders that appear whole or not at all, and failures to write them in one line.

Content is written to `<name>.partial` beside its final place and renamed when it is complete and on the disk: neither a
killed process nor a host without power leaves half of it under the final name. A process that is killed leaves the
`.partial`; the next write replaces it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_aspo.errors import RunError

PARTIAL_SUFFIX = ".partial"


def partial_path(path: Path) -> Path:
    """Where the content of `path` is written until it is complete."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def publish(path: Path) -> None:
    """Rename `partial_path(path)` to `path`, in place of an older file or folder of that name."""
    partial = partial_path(path)
    for written in (*partial.rglob("*"), partial):
        sync(written)
    if partial.is_dir():
        remove(path)  # os.replace replaces files, but no folder that has files in it
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the file at `path`, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a free path for a file or folder, which gets the name `path` when the block ends without an error."""
    partial = partial_path(path)
    remove(partial)
    yield partial
    publish(path)


def fresh_folder(path: Path) -> None:
    """Make an empty folder in place of a file or folder of that name."""
    remove(path)
    path.mkdir(parents=True)


def remove(path: Path) -> None:
    """Delete the file, the link or the whole folder at `path`, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | Path, *failures: type[BaseException]) -> Iterator[None]:
    """Raise a RunError of one line, with the space left on the disk, where writing `path` fails.

    failures: exceptions besides OSError by which a writer reports a failure.
    """
    try:
        yield
    except (OSError, *failures) as error:
        # The last line: torch's message has the tracebacks of all ranks in it.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        # The folder itself may be what could not be made.
        existing = next(parent for parent in Path(path).absolute().parents if parent.exists())
        free = shutil.disk_usage(existing).free / (1 << 30)
        room = " (make room)" if free < 1 else ""  # the writer's failure may have another cause
        raise RunError(f"cannot write {path}: {reason}; {free:.2f} GiB are free on its disk{room}") from error
