"""A full disk and a failed allocation are reported in one line with a fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import RunError
from megatron_aspo.journal.clock import Clock
from megatron_aspo.journal.files import writing
from megatron_aspo.journal.journal import Journal


def test_records_on_a_full_disk(tmp_path: Path) -> None:
    config = RunConfig(name=tmp_path.name, output_dir=str(tmp_path.parent))
    with Journal(config, [], None, is_rank_0=True) as journal:  # its end must not raise another error
        journal._metrics = Path("/dev/full").open("ab")  # noqa: SIM115  (every write there finds no space)
        with pytest.raises(RunError, match=r"cannot write /dev/full: .*No space left"):
            journal.record("train", 1, 1, {"reward/mean": 0.25})
        (tmp_path / "samples.jsonl").symlink_to("/dev/full")
        with pytest.raises(RunError, match=r"cannot write .*/samples\.jsonl: .*No space left"):
            journal.record_samples(1, [{"step": 1}])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), r"^cannot write .*/step_000001\.partial: .*No space left on device; "),
        (torch.OutOfMemoryError("CUDA out of memory"), "^out of memory in checkpoint: CUDA out of memory; "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "^out of memory in checkpoint: Default"),
        (RuntimeError("Connection closed by peer"), None),
        (RunError("lost"), None),
        (ZeroDivisionError("division by zero"), None),
    ],
)
def test_errors_of_a_part_are_told_apart(tmp_path: Path, error: Exception, told: str | None) -> None:
    clock = Clock()
    with pytest.raises(RunError if told else type(error), match=told) as caught:  # noqa: SIM117
        with clock("checkpoint"), writing(tmp_path / "step_000001.partial"):
            raise error
    assert told or caught.value is error
    assert "time/checkpoint" in clock.seconds()


def test_an_allocation_that_fails() -> None:
    with pytest.raises(RunError, match=r"out of memory in update: .*can't allocate memory"), Clock()("update"):
        torch.empty(1 << 50, dtype=torch.uint8)
