"""Logged samples: their ratios and weights do not depend on the layout, and logging does not change the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_samples, open_policy, run, run_config, tiny_run, without_times, write_weights

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import CheckpointConfig, OptimizerConfig, TrainConfig, WarmupConfig
from megatron_aspo.journal.log import read_samples
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.sample_log import score, token_columns
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.train import set_logprobs, train

pytestmark = pytest.mark.distributed

LOSSES = {
    "aspo": PolicyLossConfig(kl_coef=0.1, aggregation="seq-mean-token-mean"),
    "entropy split": PolicyLossConfig(entropy_quantile=0.8, kl_tokens="low_entropy", kl_coef=0.1),
    "gspo": PolicyLossConfig(objective="gspo", rollout_correction="truncate"),
    "gmpo": PolicyLossConfig(objective="gmpo"),
}
LAYOUTS = {
    "dp2": (2, ParallelConfig(), TrainConfig(max_tokens_per_micro_batch=100)),
    "tp2": (2, ParallelConfig(tensor=2), TrainConfig(max_tokens_per_micro_batch=1024)),
    "pp2": (2, ParallelConfig(pipeline=2), TrainConfig(max_tokens_per_micro_batch=100)),
    "cp2": (2, ParallelConfig(context=2), TrainConfig(max_tokens_per_micro_batch=100, fused_head=False)),
    "dp2-cp2": (4, ParallelConfig(context=2), TrainConfig(packing=False, max_tokens_per_micro_batch=64)),
}


def scored(weights: Path, parallel: ParallelConfig, settings: TrainConfig) -> dict[str, Any]:
    """Log-probs and entropy of `make_samples` under two policies, and the expected weights of the objectives."""
    config = replace(run_config(parallel), train=settings)
    samples = make_samples()
    with open_policy(config, weights / "old") as policy:
        batches = policy.pack(samples)
        set_logprobs(policy, [batches])
        checkpoint.load_weights(weights / "current", policy)
        table = score(policy, samples, batches)
        first = score(policy, samples[:7], batches)
        assert torch.equal(first, table[:, :7, : first.shape[2]])
    found: dict[str, Any] = dict(zip(("old", "logprobs", "entropy"), table, strict=True))
    return found | {name: token_columns(samples, table, loss) for name, loss in LOSSES.items()}


@pytest.fixture(scope="module")
def alone(weights: Path) -> dict[str, Any]:
    return run(1, scored, weights, ParallelConfig(), TrainConfig(max_tokens_per_micro_batch=1024))[0]


def test_alone_every_token_is_in_its_place(weights: Path, alone: dict[str, Any]) -> None:
    """Compare with the trainer's own log-probs of one sample at a time."""
    samples = make_samples()
    (expected,) = run(1, one_by_one, weights)
    for row, (sample, logprobs) in enumerate(zip(samples, expected, strict=True)):
        size = len(sample.token_ids)
        torch.testing.assert_close(alone["logprobs"][row, :size], logprobs, rtol=0, atol=1e-5)
        assert alone["logprobs"][row, size:].eq(0).all()
    weight, hard, soft = (alone["aspo"][name] for name in ("weight", "hard_clipped", "soft_clipped"))
    assert weight[hard].eq(0).all()
    assert weight[soft].eq(3).all()
    assert min(int(hard.sum()), int(soft.sum())) > 10
    assert not torch.equal(alone["entropy split"]["hard_clipped"], hard)


def one_by_one(weights: Path) -> list[torch.Tensor]:
    config = run_config()
    with open_policy(config, weights / "current") as policy:
        found: list[torch.Tensor] = []
        for sample in make_samples():
            batches = policy.pack([sample])
            set_logprobs(policy, [batches])
            assert batches[0].old_logprobs is not None
            found.append(batches[0].old_logprobs[batches[0].loss_mask])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ratios_and_weights_are_the_same_at(layout: str, weights: Path, alone: dict[str, Any]) -> None:
    ranks, parallel, settings = LAYOUTS[layout]
    results = run(ranks, scored, weights, parallel, settings)
    for found in results:
        for name in ("old", "logprobs", "entropy"):
            torch.testing.assert_close(found[name], alone[name], rtol=0, atol=1e-5)
        for name in LOSSES:
            columns, expected = found[name], alone[name]
            torch.testing.assert_close(columns["ratio"].log(), expected["ratio"].log(), rtol=0, atol=1e-5)
            torch.testing.assert_close(columns["weight"], expected["weight"], rtol=1e-5, atol=1e-6)
            assert all(torch.equal(columns[clip], expected[clip]) for clip in ("hard_clipped", "soft_clipped"))
    assert all(torch.equal(found["logprobs"], results[0]["logprobs"]) for found in results)


def log_and_update(weights: Path, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> Any:
    """Scored tokens of some samples, and the metrics of an update on the same tokens."""
    config = run_config(parallel, model=model, train=train)
    samples = make_samples()
    with open_policy(config, weights / "old") as policy:
        batches = policy.pack(samples)
        set_logprobs(policy, [batches])
        checkpoint.load_weights(weights / "current", policy)
        columns = token_columns(samples, score(policy, samples, batches), PolicyLossConfig())
        metrics = UpdateMetrics()
        policy.train_step(batches, PolicyLossConfig(), metrics)
        means = metrics.reduce()
    return columns, means


@pytest.mark.parametrize("experts", [0, 4])
def test_the_log_says_what_the_next_update_does(tmp_path: Path, weights: Path, experts: int) -> None:
    model, parallel, train = run_config().model, ParallelConfig(context=2), TrainConfig(max_tokens_per_micro_batch=100)
    if experts:
        model = replace(model, num_experts=experts, moe_ffn_hidden_size=32, moe_aux_loss_coef=0.0)
        parallel, train = replace(parallel, expert=2), replace(train, router_replay="trainer")
        weights = tmp_path
        run(1, write_weights, weights, model)
    columns, means = run(2, log_and_update, weights, model, parallel, train)[0]
    samples = make_samples()
    mask = torch.tensor([[i < len(s.token_ids) for i in range(columns["logprob"].shape[1])] for s in samples])
    advantages = torch.tensor([s.advantage for s in samples])[:, None]
    names = {
        "ratio": "ratio",
        "weight": "weight",
        "clip_fraction": "hard_clipped",
        "soft_clip_fraction": "soft_clipped",
    }
    for name, column in names.items():
        for sign, chosen in (("pos", mask & (advantages > 0)), ("neg", mask & (advantages < 0))):
            mean = float(columns[column][chosen].double().mean())
            assert mean == pytest.approx(means[f"{name}_{sign}"], rel=1e-5), name
    assert float(columns["entropy"][mask].double().mean()) == pytest.approx(means["entropy"], rel=1e-5)
    assert float(columns["ratio"][mask].log().abs().max()) == pytest.approx(means["log_ratio_max"], rel=1e-4)


def logging_run(folder: Path, name: str, log_samples: int) -> RunConfig:
    return tiny_run(
        folder,
        name=name,
        warmup=WarmupConfig(updates=30, batch_prompts=32, wrong_fraction=0.3, cache_dir=str(folder / "cache")),
        rollout=RolloutConfig(prompts_per_step=4, responses_per_prompt=8, max_response_tokens=4),
        optimizer=OptimizerConfig(lr=3e-3),
        train=TrainConfig(
            steps=3,
            mini_batch_prompts=2,
            epochs=2,
            max_tokens_per_micro_batch=256,
            log_samples=log_samples,
            log_samples_every=2,
        ),
        checkpoint=CheckpointConfig(every=0),
    )


def train_once(config: RunConfig) -> None:
    with distributed(config):
        train(config, [])


def test_a_run_with_samples_is_the_run_without(tmp_path: Path) -> None:
    for name, log_samples in (("with", 2), ("without", 0)):
        run(2, train_once, logging_run(tmp_path, name, log_samples))
    metrics = without_times(tmp_path / "with")
    train_records = [record for record in metrics if record["phase"] == "train"]
    assert len(train_records) == 3
    assert all(record["optimizer/grad_norm"] > 0.01 for record in train_records)
    assert train_records == [record for record in without_times(tmp_path / "without") if record["phase"] == "train"]
    assert not (tmp_path / "without" / "samples.jsonl").exists()

    lines = list(read_samples(tmp_path / "with"))
    assert [(line["step"], len(line["responses"])) for line in lines] == [(2, 8), (2, 8), (3, 8), (3, 8)]
    for line in lines:
        for response in line["responses"]:
            size = len(response["tokens"])
            assert [len(response[key]) for key in ("logprob", "ratio", "weight", "entropy")] == [size] * 4
            assert "".join(c for c in "".join(response["tokens"]) if c.isprintable() or c in "\n\t") == response["text"]
            for place in range(size):
                ratio = response["ratio"][place]
                flipped = 1 / ratio if response["advantage"] > 0 else ratio
                expected = 0.0 if place in response["hard_clipped"] else min(flipped, 3.0)
                assert response["weight"][place] == pytest.approx(expected, rel=1e-5)
    assert json.dumps(lines).count("hard_clipped") == 32
    ratios = [ratio for line in lines for response in line["responses"] for ratio in response["ratio"]]
    assert max(ratios) > 1.05  # the updates changed the policy
    assert min(ratios) < 0.95
