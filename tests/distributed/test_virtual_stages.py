"""Virtual pipeline stages and the overlapped gather of parameters change no update, checkpoint or export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_samples, open_policy, preload, run, run_config
from tiny_models import VOCAB as HF_VOCAB
from tiny_models import write_model
from torch import Tensor
from torch.testing import assert_close

from megatron_aspo.batch import MicroBatch
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import OptimizerConfig, TrainConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy import model as policy_model
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.megatron import EmbeddedEngine
from megatron_aspo.rollout.weight_sync import PolicyWeights
from megatron_aspo.train import set_logprobs

pytestmark = pytest.mark.distributed
preload("megatron_aspo.policy.hf.weights")

FAST = OptimizerConfig(lr=0.01, lr_warmup_updates=0)
VIRTUAL = ParallelConfig(pipeline=2, virtual_pipeline=2)
EXPERTS = TrainConfig(router_replay="trainer", recompute="full", max_tokens_per_micro_batch=96)


def experts(folder: Path, parallel: ParallelConfig, **settings: Any) -> RunConfig:
    model = ModelConfig(hf_path=str(folder), max_sequence_length=64, moe_aux_loss_coef=0.0)
    return run_config(parallel, model=model, optimizer=FAST, train=EXPERTS, **settings)


@contextmanager
def opened(config: RunConfig) -> Iterator[tuple[Policy, list[MicroBatch]]]:
    """A policy and its micro-batches, whose ratios are not 1."""
    with distributed(config):
        policy = Policy(config, HF_VOCAB)
        batches = policy.pack(make_samples())
        set_logprobs(policy, [batches])
        for batch in batches:
            if batch.old_logprobs is not None:
                batch.old_logprobs += 0.3 * torch.sin(batch.labels.float())
        yield policy, batches


def update(policy: Policy, batches: Sequence[MicroBatch]) -> dict[str, float]:
    metrics = UpdateMetrics()
    policy.train_step(batches, PolicyLossConfig(), metrics)
    return metrics.reduce()


def exported(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in PolicyWeights(policy).weights()}


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Whole gradients of the last update without data parallelism, by Hugging Face's names."""
    weights = [parameter.detach().clone() for parameter in policy.parameters()]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]
        found = exported(policy)
        for parameter, weight in zip(policy.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return found


def two_updates(config: RunConfig, folder: Path) -> dict[str, Any]:
    with opened(config) as (policy, batches):
        found: dict[str, Any] = {"start": exported(policy), "batches": len(batches)}
        found["layers"] = [[layer.layer_number for layer in c.module.decoder.layers] for c in policy.chunks]
        found["routers"] = [len(batch.routing or []) for batch in batches]
        for i in range(2):
            found[f"metrics {i}"], found[f"gradients {i}"] = update(policy, batches), gradients(policy)
        checkpoint.save(folder, 1, policy, {})
        share = {name: tensor.clone() for name, tensor in PolicyWeights(policy).share()}
        return found | {"end": exported(policy), "share": share}


def continued(config: RunConfig, path: Path) -> dict[str, Any]:
    """Weights and moments of a checkpoint: export them, and take a third update."""
    with opened(config) as (policy, batches):
        checkpoint.load(path, policy)
        return {"end": exported(policy), "metrics": update(policy, batches), "next": exported(policy)}


def test_two_stages_of_two_chunks_are_one_rank(tmp_path: Path) -> None:
    """Four layers of experts, recomputed, on the routes of the first pass, with tied embeddings (in a padded bucket):
    gradients, checkpoints both ways, export."""
    folder = write_model("qwen3-moe", tmp_path / "model", num_hidden_layers=4, tie_word_embeddings=True)
    one, two = experts(folder, ParallelConfig()), experts(folder, VIRTUAL)
    (alone,) = run(1, two_updates, one, tmp_path / "one")
    ranks = run(2, two_updates, two, tmp_path / "two")
    assert [rank["layers"] for rank in ranks] == [[[1], [3]], [[2], [4]]]
    assert [rank["batches"] for rank in ranks] == [alone["batches"]] * 2 == [4, 4]
    assert [rank["routers"] for rank in ranks] == [[2] * 4] * 2
    for rank in ranks:
        for i in range(2):
            assert rank[f"metrics {i}"] == pytest.approx(alone[f"metrics {i}"], rel=1e-5, abs=1e-6)
            for name, gradient in alone[f"gradients {i}"].items():
                error = float((rank[f"gradients {i}"][name] - gradient).abs().max() / gradient.abs().max())
                assert error < 1e-5, f"update {i}: {name} is off by {error:.1e} of its largest gradient"
        assert all(torch.equal(rank["start"][name], tensor) for name, tensor in alone["start"].items())
    # Each rank's share for separate rollout ranks has the tensors of its own chunks.
    shares = [rank["share"] for rank in ranks]
    assert not shares[0].keys() & shares[1].keys()
    assert {int(name.split(".")[2]) for name in shares[1] if ".layers." in name} == {1, 3}
    assert all(torch.equal((shares[0] | shares[1])[name], tensor) for name, tensor in ranks[0]["end"].items())
    # The checkpoint of one layout is read at the other one: weights to the bit, moments by the next update.
    (from_two,) = run(1, continued, one, tmp_path / "two/step_000001")
    from_one = run(2, continued, two, tmp_path / "one/step_000001")
    assert all(torch.equal(from_two["end"][name], tensor) for name, tensor in ranks[0]["end"].items())
    assert all(torch.equal(from_one[0]["end"][name], tensor) for name, tensor in alone["end"].items())
    for name, tensor in from_two["next"].items():
        assert not torch.equal(tensor, from_two["end"][name])
        assert_close(from_one[1]["next"][name], tensor, rtol=1e-4, atol=1e-5)


GATHERED = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)


def readers(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Reads of the weights after two updates each, and the largest error of the weights before a gather."""
    settings = policy_model.DistributedDataParallelConfig
    policy_model.DistributedDataParallelConfig = partial(settings, bucket_size=2000)  # type: ignore[misc]
    with open_policy(config) as policy:
        batches = policy.pack(make_samples())
        set_logprobs(policy, [batches])
        found: dict[str, Any] = {"buckets": len(policy.model.bucket_groups)}

        def train() -> list[Tensor]:
            update(policy, batches)
            update(policy, batches)
            return [parameter.detach().clone() for parameter in policy.parameters()]

        def stale(before: list[Tensor]) -> float:
            pairs = zip(before, policy.whole_chunks()[0].parameters(), strict=True)
            return max(float((old - new).abs().max()) for old, new in pairs)

        before = train()
        found["export"] = exported(policy)
        found["stale"] = stale(before)
        train()
        found["log-probs"] = torch.cat(policy.logprobs(batches))
        train()
        checkpoint.save(folder, 1, policy, {})
        kept = [parameter.detach().clone() for parameter in policy.parameters()]
        checkpoint.load(folder / "step_000001", policy)  # the weights are those of the optimizer
        found["loaded"] = exported(policy)
        found["changed by loading"] = sum(
            not torch.equal(*pair) for pair in zip(kept, policy.parameters(), strict=True)
        )
        train()
        policy.keep_reference()
        train()
        with policy.reference_weights():  # a pass within would leave later passes with what was out of date before
            found["reference"] = torch.cat(policy.logprobs(batches))
        found["exchanged back"] = torch.cat(policy.logprobs(batches))
        train()
        # One request: the other rank makes no forward pass, in which it would gather its part.
        engine = EmbeddedEngine(policy, config.rollout, AsciiTokenizer(), seed=0)
        (sample,) = engine.generate([make_samples()[0].prompt], 1, temperature=1.0)
        found["sampled"] = torch.from_numpy(sample.rollout_logprobs)
        return found


def test_whoever_reads_the_weights_reads_the_last_update_s(tmp_path: Path) -> None:
    """With two data-parallel ranks: an export, a checkpoint, the reference policy, the training model as a sampler."""
    config = run_config(optimizer=FAST, rollout=RolloutConfig(max_response_tokens=12))
    plain, overlapped = (
        run(2, readers, replace(config, parallel=layout), tmp_path / name, timeout=90)
        for layout, name in ((replace(GATHERED, overlap_param_gather=False), "plain"), (GATHERED, "overlapped"))
    )
    for expected, found in zip(plain, overlapped, strict=True):
        assert found.pop("buckets") == expected.pop("buckets") > 4
        # Buckets end in padding, which Megatron's own checkpoints of the moments would mistake for values.
        assert found["changed by loading"] == expected["changed by loading"] == 0
        assert expected.pop("stale") == 0
        assert found.pop("stale") > 1e-3
        assert found.keys() == expected.keys()
        for name in found:
            assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
