"""Checkpoints: a run goes on as if it had never stopped, at its own layout and at any other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from ranks import VOCAB, full_tensors, make_samples, run, run_config

from megatron_aspo.config import CheckpointConfig, OptimizerConfig, ParallelConfig, PolicyLossConfig, RunConfig
from megatron_aspo.distributed import distributed
from megatron_aspo.errors import UserError
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.trainer import Policy, UpdateMetrics
from megatron_aspo.run_folder import find_resume, list_checkpoints, read_meta

pytestmark = pytest.mark.distributed

LOSS = PolicyLossConfig(kl_coef=0.1)
LAYOUTS = {
    "alone": (1, ParallelConfig()),
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "cp2": (2, ParallelConfig(context=2)),
    "tp2-pp2-sp": (4, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
}


def learning_config(parallel: ParallelConfig) -> RunConfig:
    # A schedule that is still rising at the checkpoint, and a clip that is active.
    optimizer = OptimizerConfig(lr=1e-2, lr_warmup_updates=6, clip_grad=0.5)
    return replace(run_config(parallel), optimizer=optimizer)


def learn(policy: Policy, updates: range) -> list[dict[str, float]]:
    """Metrics of each update, with the learning rate and norms of all weights after it."""
    history: list[dict[str, float]] = []
    for update in updates:
        batches = policy.pack(make_samples()[update * 4 : update * 4 + 4])
        policy.fill_logprobs(batches, "old_logprobs")
        policy.fill_logprobs(batches, "ref_logprobs")
        metrics = UpdateMetrics()
        policy.train_step(batches, LOSS, metrics)
        norms = {name: float(tensor.double().norm()) for name, tensor in full_tensors(policy).items()}
        history.append({**metrics.reduce(), "lr": policy.learning_rate, **norms})
    return history


def random_numbers() -> list[float]:
    tracker: Any = get_cuda_rng_tracker()
    with tracker.fork():
        megatron = torch.rand(())
    return [random.random(), float(np.random.rand()), float(torch.rand(())), float(megatron)]


def save_and_go_on(weights: Path, root: Path, parallel: ParallelConfig, before: int) -> tuple[Any, Any]:
    """`before` updates, a checkpoint, three more updates: their history and what was drawn after the checkpoint."""
    config = learning_config(parallel)
    with distributed(config):
        policy = Policy(config, VOCAB)
        checkpoint.load_weights(weights / "reference", policy)
        policy.keep_reference()
        checkpoint.load_weights(weights / "old", policy)
        learn(policy, range(before))
        random_numbers()
        checkpoint.save(root, 7, policy, {"prompts": {"position": 42}})
        return learn(policy, range(before, before + 3)), random_numbers()


def load_and_go_on(weights: Path, root: Path, parallel: ParallelConfig, before: int) -> tuple[Any, Any]:
    config = learning_config(parallel)
    with distributed(config):
        policy = Policy(config, VOCAB)
        checkpoint.load_weights(weights / "reference", policy)
        policy.keep_reference()
        assert checkpoint.load(root / "step_000007", policy) == (7, {"prompts": {"position": 42}})
        assert policy.updates == before
        return learn(policy, range(before, before + 3)), random_numbers()


@pytest.fixture(scope="module")
def saved(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Checkpoints after two updates, and what followed on each rank."""
    found: dict[str, tuple[Path, Any]] = {}
    for layout in ("tp2", "dp2", "cp2"):
        root = tmp_path_factory.mktemp(layout)
        ranks, parallel = LAYOUTS[layout]
        found[layout] = root, run(ranks, save_and_go_on, weights, root, parallel, 2)
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
    if saved_at == loaded_at:  # to the bit, and so are the random numbers of every rank
        assert resumed == expected
        return
    for history, _ in resumed:
        for ours, theirs in zip(history, expected[0][0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def rates_with_another_one(root: Path, parallel: ParallelConfig) -> list[float]:
    config = learning_config(parallel)
    config = replace(config, optimizer=replace(config.optimizer, lr=3e-3, weight_decay=0.2))
    with distributed(config):
        policy = Policy(config, VOCAB)
        checkpoint.load(root / "step_000007", policy)
        group = policy.optimizer.param_groups[0]
        return [policy.learning_rate, group["max_lr"], group["weight_decay"]]


def test_the_learning_rate_is_the_configurations(saved: dict[str, tuple[Path, Any]]) -> None:
    ranks, parallel = LAYOUTS["tp2"]
    # The third update's of a warm-up of six.
    assert run(ranks, rates_with_another_one, saved["tp2"][0], parallel)[0] == pytest.approx([1.5e-3, 3e-3, 0.2])


def test_a_checkpoint_before_the_first_update(weights: Path, tmp_path: Path) -> None:
    _, parallel = LAYOUTS["tp2"]
    expected = run(2, save_and_go_on, weights, tmp_path, parallel, 0)
    assert run(2, load_and_go_on, weights, tmp_path, parallel, 0) == expected


def save_steps(root: Path, steps: Sequence[int], keep: int) -> None:
    config = run_config()
    with distributed(config):
        policy = Policy(config, VOCAB)
        for step in steps:
            checkpoint.save(root, step, policy, {}, keep)


def refusals(checkpoints: list[Path], hidden_size: int) -> list[str]:
    config = run_config(model=replace(run_config().model, hidden_size=hidden_size))
    messages: list[str] = []
    with distributed(config):
        policy = Policy(config, VOCAB)
        for path in checkpoints:
            with pytest.raises(UserError) as error:
                checkpoint.load(path, policy)
            messages.append(str(error.value))
    return messages


def test_only_complete_checkpoints_count_and_the_newest_are_kept(tmp_path: Path) -> None:
    run_dir = tmp_path / "test"
    root = run_dir / "checkpoints"
    (root / "step_000011").mkdir(parents=True)  # a copy that was broken off
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

    run(1, save_steps, root, (9,), 2)  # a run that was taken back to before step 9: step 10 is not its future
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
