"""Runs whose importance ratio is anchored at the sampler: without a pass for old log-probs, and else the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import everywhere, run, tiny_run, without_times

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.commands import train as train_command
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import CheckpointConfig, OptimizerConfig, TrainConfig, WarmupConfig
from megatron_aspo.journal.log import read_metrics, read_samples
from megatron_aspo.policy.sample_log import score
from megatron_aspo.rollout.megatron import EmbeddedEngine
from megatron_aspo.train import set_logprobs

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "dp2": ParallelConfig(),
    "tp2-sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "cp2": ParallelConfig(context=2),
    "pp2": ParallelConfig(pipeline=2),
}
ANCHORED = PolicyLossConfig(anchor="rollout", kl_coef=0.05)
ARMS = {
    "trainer": (PolicyLossConfig(kl_coef=0.05), 10),
    "measured": (ANCHORED, 2),
    "unmeasured": (replace(ANCHORED, anchor_band=(1e-9, 1e9)), 0),
}
"""Loss and `train.mismatch_every` of each run."""


class EqualNumerics(EmbeddedEngine):
    """The sampler's log-probs are those that the trainer's pass would give to each sample alone."""

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, temperature: float, first_group: int = 0
    ) -> list[Sample]:
        samples = everywhere(super().generate(prompts, responses_per_prompt, temperature, first_group))
        for sample in samples if temperature > 0 else []:
            batches = self.policy.pack([sample])
            set_logprobs(self.policy, [batches])
            sample.rollout_logprobs = score(self.policy, [sample], batches)[1, 0].numpy()
        return samples


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the warmed-up weights of all runs, for which packed batches take a tenth of the time."""
    folder = tmp_path_factory.mktemp("cache")
    run(1, train_once, run_of(folder, folder, "warm-up", PolicyLossConfig(), steps=1, packing=True))
    return folder


def run_of(folder: Path, cache: Path, name: str, loss: PolicyLossConfig, **train: Any) -> RunConfig:
    settings: dict[str, Any] = {"steps": 2, "mini_batch_prompts": 2, "epochs": 2, "packing": False}
    settings |= {"max_tokens_per_micro_batch": 256, "log_samples_every": 2} | train
    return tiny_run(
        folder,
        name=name,
        loss=loss,
        warmup=WarmupConfig(updates=30, batch_prompts=32, wrong_fraction=0.3, cache_dir=str(cache)),
        rollout=RolloutConfig(prompts_per_step=4, responses_per_prompt=4, max_response_tokens=4),
        optimizer=OptimizerConfig(lr=3e-3, lr_warmup_updates=0),
        train=TrainConfig(**settings),
        checkpoint=CheckpointConfig(every=0),
    )


def train_once(config: RunConfig, engine: Any = None) -> None:
    assert train_command.run(config, rollout=engine)


def train_records(folder: Path) -> list[dict[str, Any]]:
    return [record for record in without_times(folder) if record["phase"] == "train"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_equal_numerics_the_anchors_are_one_run(layout: str, cache: Path, tmp_path: Path) -> None:
    for name, (loss, every) in ARMS.items():
        config = run_of(tmp_path, cache, name, loss, mismatch_every=every)
        run(2, train_once, replace(config, parallel=LAYOUTS[layout]), EqualNumerics)
    metrics = {name: train_records(tmp_path / name) for name in ARMS}
    times = {
        name: [
            {key for key in record if key.startswith("time/")}
            for record in read_metrics(tmp_path / name)
            if record["phase"] == "train"
        ]
        for name in ARMS
    }
    of_rho = {"loss/rollout_ratio_max"} | {
        f"loss/rollout_{name}{sign}" for name in ("ratio", "cut", "dropped") for sign in ("", "_pos", "_neg")
    }
    parted = {
        f"loss/{name}{sign}"
        for name in ("rollout_logprob_diff", "rollout_kl", "update_logprob_diff")
        for sign in ("", "_pos", "_neg")
    }
    for records in zip(*metrics.values(), strict=True):
        trainer, measured, unmeasured = records
        assert trainer["mismatch/logprob_diff_max"] == 0
        assert trainer["loss/log_ratio_max_first"] == 0
        assert trainer["loss/log_ratio_max"] > 0.05
        assert trainer["optimizer/grad_norm"] > 0.01
        assert [unmeasured.pop(f"loss/anchor_cut{sign}") for sign in ("", "_pos", "_neg")] == [0, 0, 0]
        is_measured = trainer["step"] % 2 == 1
        names = {name for name in trainer if not name.startswith("mismatch/")} - of_rho - parted
        assert unmeasured == {name: trainer[name] for name in names}
        assert measured.keys() == (set(trainer) - of_rho | parted if is_measured else names)
        assert {name: measured[name] for name in measured if name in trainer} == {
            name: trainer[name] for name in measured if name in trainer
        }
    samples = {name: list(read_samples(tmp_path / name)) for name in ARMS}
    assert samples["trainer"] == samples["measured"] == samples["unmeasured"] != []
    assert ["time/old_logprobs" in keys for keys in times["trainer"]] == [True] * 2
    assert not any("time/old_logprobs" in keys for keys in times["measured"] + times["unmeasured"])
    assert ["time/mismatch" in keys for keys in times["measured"]] == [True, False]
    assert not any("time/mismatch" in keys for keys in times["trainer"] + times["unmeasured"])
    assert all("time/ref_logprobs" in keys for steps in times.values() for keys in steps)


@pytest.mark.parametrize(
    "older",
    [{"oversample": 2.0, "dynamic_sampling": False}, {"max_staleness": 2}],
    ids=["responses that go on", "stale batches"],
)
def test_one_update_with_older_tokens_moves_by_the_samplers_ratio(
    older: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    """Responses that go on after an update have some tokens of older weights, stale batches have only such tokens. With
    one update per batch pi is pi_old, so log r is the sampler's difference alone; anchored at the trainer every ratio
    is 1."""
    for name, loss in (("trainer", PolicyLossConfig()), ("rollout", PolicyLossConfig(anchor="rollout"))):
        config = run_of(tmp_path, cache, name, loss, steps=6, mini_batch_prompts=4, epochs=1, mismatch_every=1)
        run(1, train_once, replace(config, rollout=replace(config.rollout, **older)))
    inert, anchored = train_records(tmp_path / "trainer"), train_records(tmp_path / "rollout")
    assert all(record["loss/log_ratio_max"] <= 1e-5 for record in inert)
    if "max_staleness" in older:
        assert [record["rollout/staleness_updates"] for record in anchored] == [0, 1, 2, 2, 2, 2]
        shares = [0, 1, 1, 1, 1, 1]
    else:
        shares = [record["rollout/older_tokens"] for record in anchored]
    mixed = [record for record, share in zip(anchored, shares, strict=True) if share > 0]
    assert mixed
    for record, share in zip(anchored, shares, strict=True):
        assert record["loss/update_logprob_diff"] <= 1e-6
        assert record["loss/log_ratio_max"] == pytest.approx(record["mismatch/logprob_diff_max"], abs=1e-5)
        assert record["loss/log_ratio_max_first"] == record["loss/log_ratio_max"]
        current, aged = (record.get(f"mismatch/logprob_diff_{age}", 0.0) for age in ("current", "older"))
        assert current < 1e-5
        assert record["mismatch/logprob_diff"] == pytest.approx(share * aged + (1 - share) * current, rel=1e-9)
    # In a single record a few tokens may be older, and hardly moved: on one kind of CPU a mean was 4e-4.
    assert all(record["mismatch/logprob_diff_older"] > 0 for record in mixed)
    assert max(record["mismatch/logprob_diff_older"] for record in mixed) > 1e-3
    assert any(record["loss/ratio_pos"] != 1 for record in mixed)


def test_several_updates_on_stale_batches_part_the_ratio_into_both_moves(cache: Path, tmp_path: Path) -> None:
    """On its first mini-batch a step's ratio is the sampler's difference alone; later updates add their moves."""
    loss = PolicyLossConfig(anchor="rollout", anchor_band=(0.2, 5.0))
    config = run_of(tmp_path, cache, "several", loss, steps=4, mini_batch_prompts=2, epochs=2, mismatch_every=1)
    run(1, train_once, replace(config, rollout=replace(config.rollout, max_staleness=2)))
    records = train_records(tmp_path / "several")
    assert [record["rollout/staleness"] for record in records] == [0, 1, 2, 2]
    for record in records:
        assert record["loss/log_ratio_max_first"] <= record["mismatch/logprob_diff_max"] + 1e-5
        assert record["loss/update_logprob_diff"] > 1e-4
        # Every token is trained on twice, and the sampler's difference does not depend on the update.
        assert record["loss/rollout_logprob_diff"] == pytest.approx(record["mismatch/logprob_diff"], rel=1e-5)
    assert records[0]["mismatch/logprob_diff"] < 1e-5 < records[0]["loss/log_ratio_max"]
    assert any(record["loss/log_ratio_max"] > record["loss/log_ratio_max_first"] for record in records[1:])
    assert all(record["mismatch/logprob_diff"] > 1e-4 for record in records[1:])
