"""The checkpoint folder: abandoned checkpoints are set aside, failures reach all ranks, leftovers block nothing."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from ranks import ends, hold_writes, make_samples, open_policy, run, run_config, tiny_run, without_times

from megatron_aspo.batch import Batch
from megatron_aspo.commands import train
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.training import CheckpointConfig, OptimizerConfig, TrainConfig
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.journal.folder import find_resume, list_checkpoints
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.background import BackgroundWrite
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.saved_batches import load_batches
from megatron_aspo.rollout.megatron import EmbeddedEngine

pytestmark = pytest.mark.distributed


def steps_of_run(folder: Path, steps: int, resume: str, keep: int) -> None:
    config = tiny_run(
        folder,
        train=TrainConfig(steps=steps, mini_batch_prompts=1, max_tokens_per_micro_batch=100),
        checkpoint=CheckpointConfig(every=1, keep=keep, resume=resume),
    )
    assert train.run(config)


def test_a_run_that_goes_back_sets_the_newer_checkpoints_aside(tmp_path: Path) -> None:
    root = tmp_path / "test" / "checkpoints"
    run(1, steps_of_run, tmp_path, 3, "never", 0)
    newest = (root / "step_000003" / "meta.json").read_bytes()
    run(1, steps_of_run, tmp_path, 2, str(root / "step_000001"), 0)
    aside = ["step_000002.abandoned-1", "step_000003.abandoned-1"]
    assert sorted(path.name for path in root.iterdir()) == ["step_000001", "step_000002", *aside]
    run(1, steps_of_run, tmp_path, 2, str(root / "step_000001"), 1)
    aside.insert(1, "step_000002.abandoned-2")
    assert sorted(path.name for path in root.iterdir()) == ["step_000002", *aside]
    assert (root / "step_000003.abandoned-1" / "meta.json").read_bytes() == newest
    config = replace(run_config(), output_dir=str(tmp_path), checkpoint=CheckpointConfig(resume="auto"))
    assert find_resume(config) == root / "step_000002"


def failure_of_save(
    root: Path, batches: list[Batch], limit: int, trained: bool = False, asynchronous: bool = False
) -> tuple[str, float]:
    """RunError of a save whose files may not exceed `limit` bytes, and the seconds until it was raised.

    With `trained`, a checkpoint of step 1 and an update come first.
    """
    config = run_config()
    with open_policy(config) as policy:
        if trained:
            policy.train_step(policy.pack(make_samples()[:4]), PolicyLossConfig(), UpdateMetrics())
            checkpoint.save(root, 1, policy, {})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # makes a write fail, as on a full disk
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        start = time.monotonic()
        try:
            saver = checkpoint.Saver(root, CheckpointConfig(asynchronous=asynchronous))
            saver.save(2, policy, {}, batches, wait=False)
            while asynchronous and not saver.published():
                time.sleep(0.01)
        except RunError as error:
            return str(error), time.monotonic() - start
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "", 0.0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, asynchronous: bool) -> None:
    ((message, _),) = run(1, failure_of_save, tmp_path, [], 1024, True, asynchronous)
    assert message.startswith(f"cannot write {tmp_path}/step_000002.partial: ")
    assert " GiB are free on its disk" in message
    assert "\n" not in message
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000001"]


def written_and_changed(root: Path) -> tuple[float, float, set[bool]]:
    """A parameter and a buffer in a checkpoint, which change from 1 to 2 before they are written, and whether Python's
    garbage collector is on while each tensor is written."""
    with open_policy(run_config()):
        write_item: Any = filesystem_async._write_item
        collecting: list[bool] = []

        @functools.wraps(write_item)
        def noted(*arguments: Any, **named: Any) -> Any:
            collecting.append(gc.isenabled())
            return write_item(*arguments, **named)

        filesystem_async._write_item = noted
        parameter, flags = torch.nn.Parameter(torch.ones(4)), torch.ones(3)
        tensors = {"parameter": parameter, "flags": flags}
        state = {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in tensors.items()}
        released = hold_writes()
        root.mkdir()
        request = dist_checkpointing.save(state, str(root), async_sharded_save=True, async_strategy="mcore")
        write = BackgroundWrite(request, root, tensors.values(), lambda: None)
        with torch.no_grad():
            for tensor in tensors.values():
                tensor += 1
        released.set()
        write.finish()
        empty = {key: ShardedTensor.from_rank_offsets(key, torch.zeros(len(t))) for key, t in tensors.items()}
        loaded: Any = dist_checkpointing.load(empty, str(root))
        return float(loaded["parameter"].mean()), float(loaded["flags"].mean()), set(collecting)


def test_the_tensors_of_the_call_are_written(tmp_path: Path) -> None:
    assert run(1, written_and_changed, tmp_path / "state") == [(1.0, 1.0, {True})]


def run_of_six_steps(folder: Path, resume: str, killed: int = 0) -> None:
    """Checkpoints of steps 2, 4 and 6. With `killed`, rank 1 never writes its files of that step and is killed in the
    next one."""
    config = tiny_run(
        folder,
        rollout=RolloutConfig(prompts_per_step=4, responses_per_prompt=4, max_response_tokens=4),
        optimizer=OptimizerConfig(lr=1e-2, lr_warmup_updates=0),
        train=TrainConfig(steps=6, mini_batch_prompts=2, max_tokens_per_micro_batch=100),
        checkpoint=CheckpointConfig(every=2, asynchronous=True, resume=resume),
    )

    refits, refit = itertools.count(1), EmbeddedEngine.refit

    def refit_or_end(self: EmbeddedEngine) -> None:
        number = next(refits)  # one before the first step, one after each step and each checkpoint
        if os.environ.get("RANK") == "1" and killed:
            if number == killed * 3 // 2:
                hold_writes()
            if number == killed * 3 // 2 + 2:
                os.kill(os.getpid(), signal.SIGKILL)
        refit(self)

    EmbeddedEngine.refit = refit_or_end
    assert train.run(config)


def test_a_rank_killed_while_files_are_written(tmp_path: Path) -> None:
    """The other rank ends, and the run goes on from the checkpoint before as if nothing had happened."""
    (one, text), (other, _) = ends(2, run_of_six_steps, tmp_path / "killed", "never", 4)
    assert other == -signal.SIGKILL, text
    assert one
    root = tmp_path / "killed" / "test" / "checkpoints"
    assert [path.name for path in sorted(root.iterdir())] == ["step_000002", "step_000004.partial"]
    run(2, run_of_six_steps, tmp_path / "killed", "auto")
    assert [path.name for path in sorted(root.iterdir())] == ["step_000004", "step_000006"]

    run(2, run_of_six_steps, tmp_path / "undisturbed", "never")
    expected = without_times(tmp_path / "undisturbed" / "test")
    assert all(record["optimizer/grad_norm"] > 0 for record in expected if record["phase"] == "train")
    assert without_times(tmp_path / "killed" / "test") == expected


def large_batch() -> Batch:
    sample = make_samples()[0]
    sample.rollout_logprobs = np.zeros(1 << 22, dtype=np.float32)
    return Batch([[sample]], {}, {}, 0.0, 0.0)


def test_a_disk_that_fills_up_while_batches_are_saved(tmp_path: Path) -> None:
    failures = run(2, failure_of_save, tmp_path, [large_batch()], 8 << 20)
    for message, seconds in failures:
        assert message.startswith(f"cannot write {tmp_path}/step_000002.partial: [Errno 27]")
        assert "\n" not in message
        assert seconds < 30
    assert list_checkpoints(tmp_path) == []


def test_a_folder_that_cannot_be_made_fails_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for message, seconds in run(2, failure_of_save, tmp_path / "file" / "checkpoints", [], 1 << 40):
        assert message.startswith(f"cannot write {tmp_path}/file/checkpoints/step_000002.partial: [Errno 20]")
        assert seconds < 30


def test_batches_of_an_older_version_are_named(tmp_path: Path) -> None:
    batch = large_batch()
    torch.save([batch], tmp_path / "batches.pt")
    with pytest.raises(UserError, match=r"batches\.pt is of an older version"):
        load_batches(tmp_path)
    batch.metrics["rollout/staleness"] = 1.0
    torch.save([batch], tmp_path / "batches.pt")
    assert load_batches(tmp_path)[0].metrics == batch.metrics


def left_over(root: Path) -> Any:
    config = run_config()
    with open_policy(config) as policy:
        for step in (1, 2, 3):
            checkpoint.save(root, step, policy, {})
        checkpoint.save_weights(root / "weights", policy)


def test_left_overs_never_block_a_save(tmp_path: Path) -> None:
    (tmp_path / "step_000001.partial" / "rng").mkdir(parents=True)
    (tmp_path / "step_000001").mkdir()  # incomplete: an interrupted copy
    (tmp_path / "step_000001" / "__0_0.distcp").write_text("")
    (tmp_path / "step_000001.replaced.partial").mkdir()
    (tmp_path / "step_000001.replaced.partial" / "meta.json").write_text("{}")
    (tmp_path / "step_000002.partial").write_text("")
    (tmp_path / "step_000003.partial").symlink_to(tmp_path / "nowhere")
    (tmp_path / "weights.partial").write_text("")
    run(1, left_over, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_{step:06d}" for step in (1, 2, 3)]
    assert (tmp_path / "weights" / "meta.json").is_file()
