"""Settings that only Transformer Engine's layers have: the project's own choices for a GPU, on kernels in torch
operations."""

from __future__ import annotations

import importlib
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import te_ranks
import torch
from ranks import make_samples, open_policy, run_config
from te_ranks import needs_te

from megatron_aspo.batch import Prompt
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.rollout import RolloutConfig

pytestmark = [pytest.mark.distributed, pytest.mark.slow, needs_te]

MODEL = replace(run_config().model, dtype="bfloat16", hidden_size=64, num_query_groups=2)


def note_calls(*names: str) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of later calls of Transformer Engine's functions."""
    engine: Any = importlib.import_module("transformer_engine_torch")

    noted: dict[str, list[tuple[Any, ...]]] = defaultdict(list)

    def noting(name: str, kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            noted[name].append(args)
            return kernel(*args, **kwargs)

        return call

    for name in names:
        setattr(engine, name, noting(name, getattr(engine, name)))
    return noted


def passes() -> tuple[list[Any], list[Any], set[tuple[Any, ...]]]:
    """`is_training` of attention in the passes for old log-probs and for the update; (type, whether they accumulate) of
    the outputs of weight gradients."""
    from megatron_aspo.policy.metrics import UpdateMetrics

    noted = note_calls("fused_attn_fwd", "generic_gemm")
    with open_policy(run_config(model=MODEL)) as policy:
        batches = policy.pack(make_samples())
        for batch, logprobs in zip(batches, policy.logprobs(batches), strict=True):
            batch.old_logprobs = logprobs
        before = [args[2] for args in noted["fused_attn_fwd"]]
        policy.train_step(batches, PolicyLossConfig(), UpdateMetrics())
        update = [args[2] for args in noted["fused_attn_fwd"][len(before) :]]
        # Of its arguments, 3 is "the second operand is transposed", 4 the output and 14 "accumulate".
        outputs = [(args[4], args[14]) for args in noted["generic_gemm"] if args[3]]
    return before, update, {(getattr(out, "dtype", None), accumulate) for out, accumulate in outputs}


def test_log_probs_choose_the_updates_attention_and_weight_gradients_are_accumulated_in_float32() -> None:
    """cuDNN may have another plan without `is_training`, and importance ratios would begin beside 1."""
    ((before, update, outputs),) = te_ranks.run(1, passes)
    assert len(before) == len(update) == MODEL.num_layers
    assert {*before, *update} == {True}
    assert outputs == {(torch.float32, True)}


def decode() -> tuple[int, float]:
    """(calls of fused attention, mean distance to the trainer's log-probs) of sampling with the embedded engine."""
    from megatron_aspo.data.tokenizer import AsciiTokenizer
    from megatron_aspo.rollout.megatron import EmbeddedEngine

    noted = note_calls("fused_attn_fwd")
    rollout = RolloutConfig(max_response_tokens=12)
    prompts = [Prompt(i, "", tuple(range(3 + 2 * i)), {}) for i in range(3)]
    with open_policy(run_config(model=MODEL, rollout=rollout)) as policy:
        samples = EmbeddedEngine(policy, rollout, AsciiTokenizer(), 1).generate(prompts, 2, 1.0)
        calls = len(noted["fused_attn_fwd"])
        batches = policy.pack(samples)
        distances: list[Any] = []
        for batch, logprobs in zip(batches, policy.logprobs(batches), strict=True):
            assert batch.rollout_logprobs is not None
            distances.append((logprobs - batch.rollout_logprobs)[batch.loss_mask.bool()].abs())
        assert len(noted["fused_attn_fwd"]) > calls
    return calls, torch.cat(distances).mean().item()


def test_decoding_makes_no_plan_for_every_position() -> None:
    """cuDNN makes one for every length of the keys, which takes tenths of a second each."""
    ((calls, distance),) = te_ranks.run(1, decode)
    assert calls == 0
    assert distance < 0.03
