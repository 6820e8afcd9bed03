"""The reference policy: swapped with the policy once a step, in place and bit-exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_samples, open_policy, run, run_config, tiny_run

from benchmarks.counting import Count
from megatron_aspo import train
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.reference import ReferenceWeights
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.train import set_logprobs, set_ref_logprobs

pytestmark = pytest.mark.distributed


def reference_logprobs(weights: Path, config: RunConfig) -> dict[str, Any]:
    with open_policy(config, weights / "reference") as policy:
        policy.keep_reference()
        batches = policy.pack(make_samples())
        set_logprobs(policy, [batches])
        expected = [batch.old_logprobs for batch in batches]

        checkpoint.load_weights(weights / "current", policy)
        before = [parameter.detach().clone() for parameter in policy.model.parameters()]
        with Count() as count, policy.reference_weights():
            pass
        for _ in range(2):
            set_logprobs(policy, [batches])
            set_ref_logprobs(policy, [batches])
        return {
            "logprobs": all(
                torch.equal(batch.ref_logprobs, logprobs)  # type: ignore[arg-type]
                for batch, logprobs in zip(batches, expected, strict=True)
                if logprobs is not None
            ),
            "weights": all(map(torch.equal, policy.model.parameters(), before)),
            "bytes": (count.peak, max(parameter.nbytes for parameter in before)),
        }


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(pipeline=2)])
def test_the_exchange_is_exact_and_holds_one_tensor_more(parallel: ParallelConfig, weights: Path) -> None:
    ranks = parallel.tensor * parallel.pipeline
    for found in run(ranks, reference_logprobs, weights, run_config(parallel)):
        assert found["logprobs"]
        assert found["weights"]
        peak, largest = found["bytes"]
        assert 0 < peak <= largest


def exchanges_of_a_step(config: RunConfig) -> int:
    exchanges = 0
    exchanged = ReferenceWeights.exchanged

    def count(self: ReferenceWeights) -> Any:
        nonlocal exchanges
        exchanges += 1
        return exchanged(self)

    ReferenceWeights.exchanged = count
    with distributed(config):
        train.train(config, [])
    return exchanges


def test_one_exchange_a_step(tmp_path: Path) -> None:
    config = tiny_run(
        tmp_path,
        rollout=RolloutConfig(
            prompts_per_step=8, responses_per_prompt=2, max_response_tokens=12, dynamic_sampling=False
        ),
        loss=PolicyLossConfig(kl_coef=0.1),
        train=TrainConfig(steps=2, mini_batch_prompts=2, epochs=1, max_tokens_per_micro_batch=512, log_samples=0),
    )
    (exchanges,) = run(1, exchanges_of_a_step, config)
    assert exchanges == 2
