"""Atomic writes: files and folders appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_aspo.journal.files import partial_path, write_atomically


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    def fill_the_disk() -> None:
        with write_atomically(path) as partial:
            partial.symlink_to("/dev/full")
            partial.write_text("half")

    with pytest.raises(OSError, match="No space left"):
        fill_the_disk()
    assert path.read_text() == "old"
    with write_atomically(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("left_over", ["file", "folder", "link"])
def test_a_left_over_is_no_obstacle(tmp_path: Path, left_over: str) -> None:
    path = tmp_path / "step_000001"
    path.mkdir()
    (path / "old").touch()
    partial = partial_path(path)
    if left_over == "file":
        partial.touch()
    elif left_over == "folder":
        partial.mkdir()
        (partial / "half").touch()
    else:
        partial.symlink_to(tmp_path / "nowhere")
    with write_atomically(path) as folder:
        folder.mkdir()
        (folder / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []

    def fsync(descriptor: int, fsync: Callable[[int], None] = os.fsync) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def replace(source: Path, target: Path, replace: Callable[[Path, Path], None] = os.replace) -> None:
        done.append(("rename", Path(source).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with write_atomically(tmp_path / "step_000001") as folder:
        folder.mkdir()
        (folder / "meta.json").write_text("{}")
    assert done == [
        ("sync", "meta.json"),
        ("sync", "step_000001.partial"),
        ("rename", "step_000001.partial"),
        ("sync", tmp_path.name),
    ]
