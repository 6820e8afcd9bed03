"""Samples, weights and connections of a rank in large worlds: the documented table, and the code that moves them."""

from __future__ import annotations

import itertools
from dataclasses import astuple, replace

import numpy as np
import pytest

from benchmarks.scale_plane import CASES, MARKERS, PAGE, plan_at, rows, table
from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.ranks.exchange import messages, received_bytes
from megatron_aspo.tools.planning.architectures import PUBLIC, shape_of_hf
from megatron_aspo.tools.planning.traffic import traffic


def test_the_documented_table_is_that_of_the_code() -> None:
    written = PAGE.read_text().partition(MARKERS[0])[2].partition(MARKERS[1])[0]
    assert written == table()


@pytest.mark.parametrize("name", CASES)
def test_nothing_grows_with_the_world(name: str) -> None:
    """Bytes and connections of a rank at 1,024 and 4,096 GPUs; the ranks that send it samples are never more than its
    samples."""
    found = rows(name)
    for each in ([row[2] for row in found], [row[3] for row in found]):  # without and with routes
        for smaller, larger in itertools.pairwise(astuple(replace(moved, senders=0)) for moved in each):
            assert all(after <= before for before, after in zip(smaller, larger, strict=True))
    for _, plan, plain, _ in found:
        rollout, parallel = plan.config.rollout, plan.config.parallel
        layout = parallel.tensor * parallel.pipeline * parallel.context
        count = rollout.prompts_per_step * rollout.responses_per_prompt
        assert plain.senders <= count * layout // (plan.world - rollout.ranks) <= count // 2


def test_the_samples_of_a_rank_are_those_that_it_receives() -> None:
    """Qwen3-32B on 32 + 32 ranks, 2,048 samples: two replicas with 1,024 each, of which a rank owns 64 before."""
    plan = plan_at("qwen3_32b_async", 64)
    planned = traffic(plan.config, plan.shape, plan.world)
    tokens, logprobs = np.empty(0, np.int32), np.empty(0, np.float32)
    prompt, response = Prompt(0, "", (0,) * 2048, {}), plan.config.rollout.max_response_tokens
    samples = [
        Sample(prompt, i // 16, tokens, "stop", rollout_logprobs=logprobs, response_length=response, owner=i % 32)
        for i in range(2048)
    ]
    readers = [[rank for rank in range(32) if rank // 4 % 2 == i % 2] for i in range(2048)]  # tensor 4, data 2
    received = received_bytes(samples, readers, rank=0)
    assert received == (1024 - 64) * 8 * response
    lanes = 64 * 8 * response
    assert received + lanes < planned.samples < 1.1 * (received + lanes)
    assert planned.senders == 31 >= len(messages(samples, readers, 0)[0]) == 15


def test_weights_by_hand() -> None:
    """Qwen3-235B, twelve layers on a stage of 16 ranks; each of 128 rollout ranks keeps two versions of what a training
    rank sends."""
    plan = plan_at("qwen3_235b_a22b_async", 256)
    planned = traffic(plan.config, plan.shape, plan.world)
    attention = 4096 * (64 + 4 + 4) * 128 + 64 * 128 * 4096 + 2 * 128
    layer = attention + 2 * 4096 + 4096 * 128 + 128 * 3 * 4096 * 1536
    experts = 128 * 3 * 4096 * 1536
    embedding = 2 * 151936 * 4096
    by_stage = (embedding + 2 * 12 * experts // 16, 2 * 12 * (layer - experts) // 16 + 2 * 12 * experts // 16)
    assert planned.sent == max(by_stage) == by_stage[0]  # the embedding's owner has a full share of the experts
    shape = shape_of_hf(PUBLIC["Qwen/Qwen3-235B-A22B"], "")
    model = 2 * (94 * layer + 2 * shape.vocab_size * 4096 + 4096)
    assert (planned.loaded, planned.staged_once, planned.staged) == (model, planned.sent, 2 * planned.sent)
    assert (planned.lanes, planned.rollout_lanes) == (2, 2)
