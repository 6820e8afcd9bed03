"""SmolLM2-135M-Instruct: vLLM's log-probs equal the trainer's up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run, run_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_aspo.batch import Prompt
from megatron_aspo.commands.check_rollout import check_rollout
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import OptimizerConfig, TrainConfig
from megatron_aspo.data.tokenizer import HuggingFaceTokenizer
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.vllm import VllmEngine
from megatron_aspo.rollout.weight_sync import PolicyWeights, WeightSyncError
from megatron_aspo.train import set_logprobs

SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason="models/SmolLM2-135M-Instruct is not there: make smollm2"),
]

# Emulated, it takes minutes, and its rounding is not that of any machine the limit was set for.
NATIVE_BFLOAT16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU emulates bfloat16 (it has no AVX-512)"
)

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Add 17 and 25, and explain every step.",
    "Name three animals that live in the sea.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
)


class Written(TorchDispatchMode):
    """Counts the bytes that torch's operations write, to new memory or in place. Views and allocations write none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                continue
            if func._schema.is_mutable or (storage(tensor) not in given and "empty" not in func._schema.name):
                self.bytes += tensor.nbytes
        return result


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def three_verdicts(config: RunConfig) -> dict[str, Any]:
    """Checks of the initial weights, of stale ones after three uncounted updates, and after a refit. Then the bytes of
    the weights, and bytes written by the export and by a whole refit, as multiples of the first."""
    with distributed(config):
        tokenizer = HuggingFaceTokenizer(config.model.hf_path, chat_template=True)
        prompts = [Prompt(i, text, tokenizer.encode_prompt(text), {}) for i, text in enumerate(QUESTIONS)]
        policy = Policy(config, tokenizer.vocab_size)
        engine = VllmEngine(PolicyWeights(policy), config.model, config.rollout, tokenizer, seed=1)
        engine.refit()
        result: dict[str, Any] = {"fresh": check_rollout(policy, engine, prompts, config)}
        samples = engine.generate(prompts[:2], 2, 1.0)
        for i, sample in enumerate(samples):
            sample.advantage = 1.0 if i % 2 else -1.0
        batches = policy.pack(samples)
        set_logprobs(policy, [batches])
        metrics = UpdateMetrics()
        for _ in range(3):
            policy.train_step(batches, PolicyLossConfig(), metrics)
        with pytest.raises(WeightSyncError, match="version 0 and the policy version 3"):
            engine.generate(prompts, 1, 1.0)
        policy.weight_version = 0  # leaves the weight version unchanged
        result["stale"] = check_rollout(policy, engine, prompts, config)
        result["refitted"] = check_rollout(policy, engine, prompts, config)

        size = sum(tensor.nbytes for _, tensor in engine.source.weights())
        with Written() as export:
            for _ in engine.source.weights():
                pass
        with Written() as refit:
            engine.refit()
        return result | {"size": size, "export": export.bytes / size, "refit": refit.bytes / size}


@pytest.mark.parametrize(
    ("dtype", "mean", "k3"),
    # The project's limit for bfloat16, where the two engines round differently, and rounding errors for float32.
    [pytest.param("bfloat16", 0.06, 4e-3, marks=NATIVE_BFLOAT16), ("float32", 1e-4, 1e-6)],
)
def test_logprobs_before_and_after_updates_and_the_cost_of_a_refit(dtype: Any, mean: float, k3: float) -> None:
    """The export copies the fused matrices that it splits (queries, keys and values), an eighth of this model; other
    tensors are the parameters' own memory. vLLM writes each weight once, and the tied embedding twice."""
    config = run_config(
        model=ModelConfig(hf_path=str(SMOLLM2), dtype=dtype, max_sequence_length=128),
        rollout=RolloutConfig(
            engine="vllm", responses_per_prompt=2, max_response_tokens=24, batch_size=16, kv_cache_gb=0.2
        ),
        optimizer=OptimizerConfig(lr=3e-5, lr_warmup_updates=0),
        train=TrainConfig(max_tokens_per_micro_batch=512),
    )
    (result,) = run(1, three_verdicts, config, timeout=480)  # 41 s where AVX-512 is
    fresh, stale, refitted = (result[name] for name in ("fresh", "stale", "refitted"))
    for verdict in (fresh, refitted):
        assert verdict.causes == ()
        assert verdict.tokens > 200
        assert verdict.numbers["logprob_diff"] <= mean, str(verdict)
        assert verdict.numbers["kl"] <= k3, str(verdict)
    assert stale.numbers["logprob_diff"] > 2 * mean, str(stale)
    assert stale.causes[0].startswith("stale weights"), str(stale)
    assert result["size"] > 250e6
    assert 0.12 < result["export"] < 0.125, result
    assert 1 < result["refit"] - result["export"] < 1.3, result
