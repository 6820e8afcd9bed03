"""The same batch and weights give the same update for every distribution of model and batch over ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import gradients_of_steps, make_samples, open_policy, run, run_config, write_weights

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.train import set_logprobs, set_ref_logprobs

pytestmark = pytest.mark.distributed

TIED = replace(run_config().model, tie_embeddings=True)
_BOTH: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.01}
LOSSES = {
    "aspo": PolicyLossConfig(**_BOTH),
    "aspo, mean of means": PolicyLossConfig(aggregation="seq-mean-token-mean", **_BOTH),
    "aspo, mean of sums": PolicyLossConfig(aggregation="seq-mean-token-sum", **_BOTH),
    "aspo, sums by a constant": PolicyLossConfig(aggregation="seq-mean-token-sum-norm", norm_length=12, **_BOTH),
    "aspo, entropy split": PolicyLossConfig(entropy_quantile=0.8, **_BOTH),
    "grpo": PolicyLossConfig(objective="grpo", kl_coef=0.1, kl_estimator="k1"),
    "no_is": PolicyLossConfig(objective="no_is", kl_coef=0.1, kl_estimator="k2"),
    "response_mean_is": PolicyLossConfig(objective="response_mean_is"),
    "cispo": PolicyLossConfig(objective="cispo"),
    "gspo": PolicyLossConfig(objective="gspo", aggregation="seq-mean-token-mean"),
    "gmpo": PolicyLossConfig(objective="gmpo", aggregation="seq-mean-token-mean"),
    "dppo": PolicyLossConfig(objective="dppo", clip_low=0.01, clip_high=0.01),
    "sapo": PolicyLossConfig(objective="sapo"),
    "aspo, anchored": PolicyLossConfig(anchor="rollout", anchor_band=(0.05, 5.0), **_BOTH),
    "gspo, anchored": PolicyLossConfig(objective="gspo", anchor="rollout", aggregation="seq-mean-token-mean"),
}
ARRANGEMENTS = {
    "one stream": (TrainConfig(max_tokens_per_micro_batch=1024), ["aspo, entropy split"]),
    "several streams": (TrainConfig(max_tokens_per_micro_batch=100), list(LOSSES)),
    "a stream per sample": (TrainConfig(packing=False, max_tokens_per_micro_batch=64), ["aspo", "gspo"]),
    "through logits": (
        TrainConfig(fused_head=False, max_tokens_per_micro_batch=100),
        ["aspo, mean of means", "aspo, entropy split", "aspo, anchored", "grpo", "gspo", "gspo, anchored"],
    ),
}
"""Arrangement of the batch in micro-batches and type of loss head -> (settings, names of the tested losses)."""

FEWER = {"aspo", "aspo, entropy split", "aspo, anchored", "response_mean_is", "gspo", "gmpo"}
"""Losses that need the most of other ranks. Layouts that are not in `ALL_LOSSES` take these."""

REFERENCE = {"one stream": (ARRANGEMENTS["one stream"][0], list(LOSSES))}
LAYOUTS = {
    "alone": (1, ParallelConfig()),
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "tp2-sp": (2, ParallelConfig(tensor=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "dp2-tp2": (4, ParallelConfig(tensor=2)),
    "dp2-tp2-sp": (4, ParallelConfig(tensor=2, sequence_parallel=True)),
    "dp2-pp2": (4, ParallelConfig(pipeline=2)),
    "tp2-pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "tp2-pp2-sp": (4, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
    "cp2": (2, ParallelConfig(context=2)),
    "cp3": (3, ParallelConfig(context=3)),
    "dp2-cp2": (4, ParallelConfig(context=2)),
    "tp2-cp2": (4, ParallelConfig(tensor=2, context=2)),
    "tp2-cp2-sp": (4, ParallelConfig(tensor=2, context=2, sequence_parallel=True)),
    "cp2-pp2": (4, ParallelConfig(context=2, pipeline=2)),
}
ALL_LOSSES = {"alone", "dp2", "tp2", "pp2", "cp2", "tp2-cp2-sp", "cp2-pp2"}


def take_updates(
    folder: Path,
    model: ModelConfig,
    parallel: ParallelConfig,
    arrangements: Any,
    count: int | None = None,
    config: RunConfig | None = None,
) -> dict[Any, Any]:
    """Map (arrangement, loss) to (metrics, full gradients by name) of one update on `count` samples."""
    config = config or run_config(parallel, model=model)
    updates: dict[Any, Any] = {}
    with open_policy(config, folder / "reference") as policy:
        policy.keep_reference()
        gradients = gradients_of_steps(policy)
        for arrangement, (train, losses) in arrangements.items():
            policy.config = replace(config, train=train)
            batches = policy.pack(make_samples()[:count])
            checkpoint.load_weights(folder / "old", policy)
            set_logprobs(policy, [batches])
            set_ref_logprobs(policy, [batches])
            checkpoint.load_weights(folder / "current", policy)
            for name in losses:
                metrics = UpdateMetrics()
                policy.train_step(batches, LOSSES[name], metrics)
                updates[arrangement, name] = metrics.reduce(), gradients.pop()
    return updates


@pytest.fixture(scope="session")
def reference(weights: Path) -> dict[Any, Any]:
    return run(1, take_updates, weights, run_config().model, ParallelConfig(), REFERENCE)[0]


def check_updates(updates: list[dict[Any, Any]], reference: dict[Any, Any], tolerance: float = 1e-5) -> None:
    for (arrangement, loss), (metrics, gradients) in updates[0].items():
        where = f"{loss}, {arrangement}"
        expected_metrics, expected_gradients = reference["one stream", loss]
        assert all(other[arrangement, loss][0] == metrics for other in updates[1:]), where
        assert metrics == pytest.approx(expected_metrics, rel=tolerance, abs=1e-6), where
        assert gradients.keys() == expected_gradients.keys(), where
        for name, expected in expected_gradients.items():
            error = float((gradients[name] - expected).abs().max() / expected.abs().max())
            assert error < tolerance, f"{where}: {name} is off by {error:.1e} of its largest gradient"
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5), where


def test_the_batch_reaches_every_region_of_the_clips(reference: dict[Any, Any]) -> None:
    metrics, _ = reference["one stream", "aspo"]
    for sign in ("pos", "neg"):
        hard, soft = metrics[f"clip_fraction_{sign}"], metrics[f"soft_clip_fraction_{sign}"]
        assert hard > 0.1
        assert soft > 0.1
        assert hard + soft < 0.9
    different = {round(reference["one stream", loss][0]["grad_norm"], 6) for loss in LOSSES}
    assert len(different) == len(LOSSES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_is_the_same_at(layout: str, weights: Path, reference: dict[Any, Any]) -> None:
    ranks, parallel = LAYOUTS[layout]
    arrangements = ARRANGEMENTS
    if layout not in ALL_LOSSES:
        arrangements = {
            name: (train, [x for x in losses if x in FEWER]) for name, (train, losses) in arrangements.items()
        }
    updates = run(ranks, take_updates, weights, run_config().model, parallel, arrangements)
    check_updates(updates, reference)


def test_an_update_of_tied_embeddings_is_the_same_at_two_stages(tmp_path: Path) -> None:
    run(1, write_weights, tmp_path, TIED)
    (reference,) = run(1, take_updates, tmp_path, TIED, ParallelConfig(), REFERENCE)
    updates = run(2, take_updates, tmp_path, TIED, ParallelConfig(pipeline=2), ARRANGEMENTS)
    check_updates(updates, reference)


@pytest.mark.parametrize("layout", ["dp2", "dp2-tp2", "dp2-cp2"])
def test_a_rank_without_samples_changes_nothing(layout: str, weights: Path) -> None:
    ranks, parallel = LAYOUTS[layout]
    (reference,) = run(1, take_updates, weights, run_config().model, ParallelConfig(), REFERENCE, 1)
    arrangements = {name: (train, ["aspo, entropy split", "cispo"]) for name, (train, _) in ARRANGEMENTS.items()}
    updates = run(ranks, take_updates, weights, run_config().model, parallel, arrangements, 1)
    assert "rollout_logprob_diff" in updates[0]["one stream", "aspo, entropy split"][0]
    check_updates(updates, reference)
