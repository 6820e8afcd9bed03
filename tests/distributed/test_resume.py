"""Checkpoints: a resumed run continues as if it had never stopped, in the same layout and in any other."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import full_tensors, hold_writes, make_samples, open_policy, run, run_config
from test_layouts import LAYOUTS

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import CheckpointConfig, OptimizerConfig
from megatron_aspo.errors import UserError
from megatron_aspo.journal.folder import find_resume, list_checkpoints, read_meta
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.train import set_logprobs, set_ref_logprobs

pytestmark = pytest.mark.distributed

LOSS = PolicyLossConfig(kl_coef=0.1)


def learning_config(parallel: ParallelConfig) -> RunConfig:
    # A schedule that is still rising at the checkpoint, and an active clip.
    optimizer = OptimizerConfig(lr=1e-2, lr_warmup_updates=6, clip_grad=0.5)
    return replace(run_config(parallel), optimizer=optimizer)


def learn(policy: Policy, updates: range) -> list[dict[str, float]]:
    """Metrics of each update, with the learning rate and norms of all weights after it."""
    history: list[dict[str, float]] = []
    for update in updates:
        batches = policy.pack(make_samples()[update * 4 : update * 4 + 4])
        set_logprobs(policy, [batches])
        set_ref_logprobs(policy, [batches])
        metrics = UpdateMetrics()
        policy.train_step(batches, LOSS, metrics)
        norms = {name: float(tensor.double().norm()) for name, tensor in full_tensors(policy).items()}
        history.append({**metrics.reduce(), "lr": policy.learning_rate, **norms})
    return history


def save_and_go_on(
    weights: Path, root: Path, parallel: ParallelConfig, before: int, asynchronous: bool = False
) -> list[dict[str, float]]:
    """Run `before` updates, save, run three more updates and return their history.

    With `asynchronous` the files are written after these updates.
    """
    config = learning_config(parallel)
    with open_policy(config, weights / "reference") as policy:
        policy.keep_reference()
        checkpoint.load_weights(weights / "old", policy)
        learn(policy, range(before))
        updated = hold_writes() if asynchronous else threading.Event()
        saver = checkpoint.Saver(root, CheckpointConfig(asynchronous=asynchronous))
        saver.save(7, policy, {"prompts": {"position": 42}}, (), wait=False)
        history = learn(policy, range(before, before + 3))
        assert saver.published() == {}
        assert list_checkpoints(root) == [] if asynchronous else [root / "step_000007"]
        updated.set()
        while asynchronous and not saver.published():
            time.sleep(0.01)
        return history


def load_and_go_on(weights: Path, root: Path, parallel: ParallelConfig, before: int) -> list[dict[str, float]]:
    """Load the checkpoint of `save_and_go_on` and continue as it does."""
    config = learning_config(parallel)
    with open_policy(config, weights / "reference") as policy:
        policy.keep_reference()
        assert checkpoint.load(root / "step_000007", policy) == (7, {"prompts": {"position": 42}})
        assert policy.weight_version == before
        return learn(policy, range(before, before + 3))


@pytest.fixture(scope="module")
def saved(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Checkpoints after two updates, and each rank's results after them."""
    found: dict[str, tuple[Path, Any]] = {}
    for layout in ("tp2", "dp2", "cp2"):
        root = tmp_path_factory.mktemp(layout)
        ranks, parallel = LAYOUTS[layout]
        found[layout] = root, run(ranks, save_and_go_on, weights, root, parallel, 2, layout == "dp2")
    return found


@pytest.mark.parametrize(
    ("saved_at", "loaded_at"),
    [
        *[("tp2", "tp2"), ("tp2", "alone"), ("tp2", "pp2"), ("tp2", "dp2"), ("dp2", "dp2"), ("dp2", "tp2-pp2-sp")],
        *[("cp2", "cp2"), ("cp2", "alone"), ("dp2", "cp2")],
    ],
)
def test_updates_go_on_as_if_nothing_had_happened(
    saved_at: str, loaded_at: str, weights: Path, saved: dict[str, tuple[Path, Any]]
) -> None:
    root, expected = saved[saved_at]
    ranks, parallel = LAYOUTS[loaded_at]
    resumed = run(ranks, load_and_go_on, weights, root, parallel, 2)
    if saved_at == loaded_at:
        assert resumed == expected
        return
    for history in resumed:
        for resumed_update, update in zip(history, expected[0], strict=True):
            assert resumed_update == pytest.approx(update, rel=1e-5, abs=1e-6)


def elements_gathered_while_saving(root: Path) -> int:
    """Elements that `all_gather` receives on a rank during a save. On a GPU they would take device memory."""
    config = learning_config(ParallelConfig())
    with open_policy(config) as policy:
        policy.keep_reference()
        learn(policy, range(1))
        received = 0
        all_gather = dist.all_gather

        def counted(tensors: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal received
            received += sum(one.numel() for one in tensors if one.is_floating_point())
            return all_gather(tensors, tensor, *args, **kwargs)

        dist.all_gather = counted
        checkpoint.save(root, 1, policy, {})
        return received


def test_a_save_gathers_no_optimizer_state_on_the_device(tmp_path: Path) -> None:
    assert run(2, elements_gathered_while_saving, tmp_path) == [0, 0]


def rates_with_another_one(root: Path, parallel: ParallelConfig) -> list[float]:
    config = learning_config(parallel)
    config = replace(config, optimizer=replace(config.optimizer, lr=3e-3, weight_decay=0.2))
    with open_policy(config) as policy:
        checkpoint.load(root / "step_000007", policy)
        group = policy.optimizer.param_groups[0]
        return [policy.learning_rate, group["max_lr"], group["weight_decay"]]


def test_the_learning_rate_is_the_configurations(saved: dict[str, tuple[Path, Any]]) -> None:
    ranks, parallel = LAYOUTS["tp2"]
    # value of the third update in a warm-up of six
    assert run(ranks, rates_with_another_one, saved["tp2"][0], parallel)[0] == pytest.approx([1.5e-3, 3e-3, 0.2])


def falling_rates() -> list[float]:
    config = learning_config(ParallelConfig())
    with open_policy(config) as policy:
        policy.reset_optimizer(replace(config.optimizer, lr=8.0, lr_warmup_updates=2), decay_updates=10)
        rates: list[float] = []
        for _ in range(11):
            rates.append(policy.learning_rate)
            policy.scheduler.step(1)
        return rates


def test_the_learning_rate_of_a_warm_up_may_fall_to_0() -> None:
    assert run(1, falling_rates)[0] == pytest.approx([4, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0])


def test_a_checkpoint_before_the_first_update(weights: Path, tmp_path: Path) -> None:
    _, parallel = LAYOUTS["tp2"]
    expected = run(2, save_and_go_on, weights, tmp_path, parallel, 0)
    assert run(2, load_and_go_on, weights, tmp_path, parallel, 0) == expected


def save_steps(root: Path, steps: Sequence[int], keep: int) -> None:
    config = run_config()
    with open_policy(config) as policy:
        for step in steps:
            checkpoint.save(root, step, policy, {}, keep)


def refusals(checkpoints: list[Path], hidden_size: int) -> list[str]:
    config = run_config(model=replace(run_config().model, hidden_size=hidden_size))
    messages: list[str] = []
    with open_policy(config) as policy:
        for path in checkpoints:
            with pytest.raises(UserError) as error:
                checkpoint.load(path, policy)
            messages.append(str(error.value))
    return messages


def test_only_complete_checkpoints_count_and_the_newest_are_kept(tmp_path: Path) -> None:
    run_dir = tmp_path / "test"
    root = run_dir / "checkpoints"
    (root / "step_000011").mkdir(parents=True)  # an interrupted copy
    (root / "step_000012.partial").mkdir()
    (root / "step_000012.partial" / "meta.json").write_text("{}")
    config = replace(run_config(), output_dir=str(tmp_path), checkpoint=CheckpointConfig(resume="auto"))
    assert list_checkpoints(root) == []
    assert find_resume(config) is None

    run(1, save_steps, root, (8, 9, 10), 2)
    assert [path.name for path in list_checkpoints(root)] == ["step_000009", "step_000010"]
    assert not (root / "step_000008").exists()
    assert find_resume(config) == root / "step_000010"
    assert [read_meta(path)["step"] for path in list_checkpoints(root)] == [9, 10]

    run(1, save_steps, root, (9,), 2)  # a run rolled back to before step 9: step 10 is not its future
    assert [path.name for path in list_checkpoints(root)] == ["step_000009"]


def test_what_cannot_be_loaded_is_named_in_one_line(tmp_path: Path) -> None:
    run(1, save_steps, tmp_path, (8, 9, 10), 0)
    min((tmp_path / "step_000008").glob("*.distcp")).unlink()
    for step, name in ((9, "__0_0.distcp"), (10, ".metadata")):
        whole = (tmp_path / f"step_{step:06d}" / name).read_bytes()
        (tmp_path / f"step_{step:06d}" / name).write_bytes(whole[: len(whole) // 2])
    paths = [tmp_path / f"step_{step:06d}" for step in (8, 9, 10, 11)]
    damaged, truncated, without_index, missing = run(1, refusals, paths, 32)[0]
    assert damaged.startswith(f"cannot read checkpoint {paths[0]}: FileNotFoundError")
    assert truncated.startswith(f"cannot read checkpoint {paths[1]}")
    assert without_index.startswith(f"cannot read checkpoint {paths[2]}")
    assert missing.startswith(f"{paths[3]} is not a complete checkpoint")
    (other_model,) = run(1, refusals, paths[:1], 64)[0]
    assert "hidden_size=32, here hidden_size=64" in other_model
    assert not any("\n" in message for message in (damaged, truncated, without_index, other_model))
