"""Costs of the fused head: collectives and their bytes, the largest tensor, memory; also a rank with bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from heads import CHUNK, SHARD, TOKENS, WIDTH, Place, random_inputs
from ranks import ends, run, run_config
from watch import Watch

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.loss import fused_linear_logprobs, fused_linear_policy_loss
from megatron_aspo.ranks.process_group import distributed

pytestmark = pytest.mark.distributed

COUNTED = {
    "aspo": PolicyLossConfig(),
    "mean of means": PolicyLossConfig(aggregation="seq-mean-token-mean", entropy_coef=0.1),
    "veto": PolicyLossConfig(rollout_veto=0.1),
    "gspo": PolicyLossConfig(objective="gspo"),
    "gmpo": PolicyLossConfig(objective="gmpo"),
    "response_mean_is": PolicyLossConfig(objective="response_mean_is"),
    "entropy split": PolicyLossConfig(entropy_quantile=0.8),
}
RESPONSE_ROWS = {"aspo": 0, "mean of means": 2, "veto": 3, "gspo": 3, "response_mean_is": 3, "entropy split": 3}
RESPONSE_ROWS["gmpo"] = 4
"""Numbers per token gathered over all context-parallel ranks: mask, id, and the terms of per-response quantities."""


def count(tp: int, cp: int) -> dict[tuple[str, bool], tuple[Any, Any, int]]:
    """Map (case, sequence parallelism) to its collectives forward and backward, and the largest tensor's elements."""
    found: dict[tuple[str, bool], tuple[Any, Any, int]] = {}
    with distributed(run_config()):
        place = Place(tp, cp)
        for sequence_parallel in (False, True) if tp > 1 else (False,):
            for name, config in COUNTED.items():
                inputs = random_inputs(tp, tp_group=place.tp_group)
                if sequence_parallel:
                    inputs["hidden"] = place.shard(inputs["hidden"].detach()).requires_grad_()
                inputs["sequence_parallel"] = sequence_parallel
                with Watch() as forward:
                    output = fused_linear_policy_loss(**inputs, config=config, cp_group=place.cp_group)
                with Watch() as backward:
                    output.loss_sum.backward()
                sizes = max(forward.largest, backward.largest)
                found[name, sequence_parallel] = forward.collectives, backward.collectives, sizes
            unknown = ("old_logprobs", "advantages", "rollout_logprobs", "sequence_ids")
            inputs = {name: value for name, value in inputs.items() if name not in unknown}
            with Watch() as forward:
                fused_linear_logprobs(**inputs)
            found["log-probs", sequence_parallel] = forward.collectives, [], forward.largest
    return found


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (1, 2), (4, 1), (2, 2)])
def test_collectives_are_one_per_chunk_and_one_in_the_backward_pass(tp: int, cp: int) -> None:
    for found in run(tp * cp, count, tp, cp):
        assert len(found) == (len(COUNTED) + 1) * (2 if tp > 1 else 1)
        for (name, sequence_parallel), (forward, backward, largest) in found.items():
            states = [("allgather_base", TOKENS // tp * WIDTH * 4)] if sequence_parallel else []
            two_sweeps = name in ("gspo", "gmpo", "response_mean_is", "entropy split", "log-probs")
            chunk = TOKENS if two_sweeps else CHUNK
            statistics = [("allgather_base", 16 * chunk)] * (TOKENS // chunk) if tp > 1 else []
            rows = RESPONSE_ROWS.get(name, 0) if cp > 1 else 0
            responses = [("allgather_base", 8 * rows * TOKENS)] if rows else []
            middle = statistics + responses if two_sweeps else responses + statistics
            assert forward == states + middle, name
            reduction = "reduce_scatter_base" if sequence_parallel else "allreduce"
            expected = [(reduction, TOKENS * WIDTH * 4)] if tp > 1 and name != "log-probs" else []
            assert backward == expected, name
            assert largest == CHUNK * SHARD, name


BAD: dict[str, dict[str, Any]] = {
    "targets": {"targets": torch.full((TOKENS,), 10**6)},
    "weight": {"weight": torch.zeros(SHARD, WIDTH + 1)},
}


def bad_on_one_rank(name: str) -> None:
    with distributed(run_config()):
        place = Place(2, 1)
        inputs = random_inputs(2, tp_group=place.tp_group)
        if dist.get_rank() == 1:
            inputs |= BAD[name]
        fused_linear_policy_loss(**inputs, config=COUNTED["veto"])


@pytest.mark.parametrize("name", BAD)
def test_a_bad_rank_leaves_no_other_rank_hanging(name: str) -> None:
    (code, output), (bad_code, bad_output) = ends(2, bad_on_one_rank, name, timeout=30)
    assert bad_code == code == 1
    assert f"ValueError: {name} " in bad_output
    assert "ValueError" not in output
