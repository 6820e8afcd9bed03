"""A full disk and a failed allocation are told in a line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_aspo.errors import RunError
from megatron_aspo.journal import Clock
from megatron_aspo.policy import checkpoint
from megatron_aspo.run_log import RunLog


def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    log = RunLog(tmp_path, None)
    log._file.close()
    log._file = Path("/dev/full").open("a")  # noqa: SIM115  (every write there finds no space)
    with pytest.raises(RunError, match=r"^cannot write /dev/full: No space left on device; make room$"):
        log.log(1, "train", {"reward/mean": 0.25})
    log.close()  # the end of a run, which has the error to tell and must not raise another


def test_samples_on_a_full_disk(tmp_path: Path) -> None:
    log = RunLog(tmp_path, None)
    (tmp_path / "samples.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"^cannot write .*/samples\.jsonl: No space left on device; make room$"):
        log.log_samples([{"step": 1}])


def test_out_of_memory_names_the_part_of_the_step() -> None:
    clock = Clock()
    told = r"^out of memory in update: .*can't allocate memory.*; megatron-aspo plan says"
    with pytest.raises(RunError, match=told), clock("update"):
        torch.empty(1 << 50, dtype=torch.uint8)
    assert "time/update" in clock.seconds()
    told = r"^out of memory in old_logprobs: CUDA out of memory; "
    with pytest.raises(RunError, match=told), clock("old_logprobs"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_stay_what_they_are() -> None:
    clock = Clock()
    for error in (RuntimeError("Connection closed by peer"), RunError("lost"), ZeroDivisionError("division by zero")):
        with pytest.raises(type(error)) as caught, clock("update"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), r"^cannot write .*/step_000001\.partial: .*No space left on device; "),
        (RuntimeError("Connection closed by peer"), "^Connection closed by peer$"),
        (torch.OutOfMemoryError("CUDA out of memory"), "^out of memory in checkpoint: CUDA out of memory; "),
    ],
)
def test_what_stops_a_checkpoint_is_told_apart(tmp_path: Path, error: Exception, told: str) -> None:
    clock = Clock()
    with pytest.raises(RuntimeError if "peer" in told else RunError, match=told):  # noqa: SIM117
        with clock("checkpoint"), checkpoint._writing(tmp_path / "step_000001.partial"):
            raise error
