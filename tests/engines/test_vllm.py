"""vLLM beside the trainer: the same log-probs, before and after refits, and nothing left behind."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from ranks import VOCAB, run, run_config
from tiny_models import write_model

from megatron_aspo.check_rollout import Verdict, check_rollout
from megatron_aspo.config import (
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyLossConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_aspo.distributed import distributed
from megatron_aspo.mismatch import measure_mismatch
from megatron_aspo.policy.trainer import Policy, UpdateMetrics
from megatron_aspo.rollout.engine import build_engine
from megatron_aspo.rollout.megatron import EmbeddedEngine
from megatron_aspo.rollout.vllm import PolicyWeights, VllmEngine
from megatron_aspo.tokenizer import AsciiTokenizer
from megatron_aspo.train import train
from megatron_aspo.types import Prompt, Sample
from megatron_aspo.weight_sync import WeightSyncError, check_copies

pytestmark = pytest.mark.engines

# vLLM's attention on a CPU wants heads of 32 at least.
LLAMA = ModelConfig(hidden_size=128, ffn_hidden_size=192, max_sequence_length=64)
ROLLOUT = RolloutConfig(engine="vllm", max_response_tokens=12, batch_size=64, kv_cache_gb=0.1)
LAYOUTS = {
    "alone": (1, ParallelConfig(), 1),
    "dp2": (2, ParallelConfig(), 1),
    "tp2 beside tp2": (2, ParallelConfig(tensor=2), 2),
    "tp1 beside tp2": (2, ParallelConfig(tensor=2), 1),
    "tp2 beside pp2": (2, ParallelConfig(pipeline=2), 2),
}


def vllm_config(model: ModelConfig = LLAMA, parallel: ParallelConfig | None = None, **rollout: Any) -> RunConfig:
    """Updates that move every log-prob visibly."""
    return run_config(
        parallel,
        model=model,
        rollout=replace(ROLLOUT, **rollout),
        optimizer=OptimizerConfig(lr=1e-2, lr_warmup_updates=0),
    )


def make_prompts(count: int = 32) -> list[Prompt]:
    rng = np.random.default_rng(3)
    return [
        Prompt(i, "", tuple(rng.integers(VOCAB, size=length).tolist()), {})
        for i, length in enumerate(rng.integers(3, 20, size=count))
    ]


def update(policy: Policy, samples: list[Sample], updates: int) -> None:
    for i, sample in enumerate(samples):
        sample.advantage = 1.0 if i % 2 else -1.0
    batches = policy.pack(samples)
    policy.fill_logprobs(batches, "old_logprobs")
    metrics = UpdateMetrics()
    for _ in range(updates):
        policy.train_step(batches, PolicyLossConfig(), metrics)


def mismatch(policy: Policy, samples: list[Sample]) -> dict[str, float]:
    batches = policy.pack(samples)
    policy.fill_logprobs(batches, "old_logprobs")
    return measure_mismatch([batches])


def sample_update_refit(config: RunConfig) -> dict[str, Any]:
    """What one engine does in its life: everything is in one function, because vLLM takes seconds to start."""
    found: dict[str, Any] = {}
    with distributed(config):
        policy = Policy(config, VOCAB)
        engine = build_engine(policy, config.rollout, AsciiTokenizer(), seed=1)
        assert isinstance(engine, VllmEngine)
        with pytest.raises(WeightSyncError, match="refit was not called"):
            engine.generate(make_prompts(1), 1, 1.0)
        engine.refit()
        found["samples"] = engine.generate(make_prompts(), 4, 1.0, first_group=5)
        found["again"] = engine.generate(make_prompts()[:3], 4, 1.0)
        found["fresh"] = mismatch(policy, found["samples"])
        update(policy, found["samples"], 3)
        found["stale"] = mismatch(policy, found["samples"])
        with pytest.raises(WeightSyncError, match="weights of update 0, the policy those of 3"):
            engine.generate(make_prompts(1), 1, 1.0)
        engine.refit()
        later = engine.generate(make_prompts(), 4, 1.0)
        found["refitted"] = mismatch(policy, later)
        found["versions"] = {sample.weight_version for sample in later}
        found["greedy"] = engine.generate(make_prompts(), 1, 0.0)
        found["embedded"] = EmbeddedEngine(policy, config.rollout, AsciiTokenizer(), 1).generate(make_prompts(), 1, 0.0)
        found["sync"] = engine.last_sync
        assert engine.last_sync is not None
        found["copies"] = engine._copies()
        engine._llm.apply_model(perturb)
        with pytest.raises(WeightSyncError, match=r"1 of \d+ tensors in vLLM are not as sent: model.norm.weight"):
            check_copies(engine.last_sync.checksums, engine._copies(), "in vLLM")
    return found


def perturb(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] += 1e-3


def contents(samples: list[Sample]) -> list[tuple[Any, ...]]:
    return [(s.prompt.id, s.group, s.token_ids, s.finish_reason) for s in samples]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_greedy_responses_are_the_trainers_before_and_after_updates(layout: str) -> None:
    ranks, parallel, tensor = LAYOUTS[layout]
    config = vllm_config(parallel=parallel, tensor=tensor, refit_bucket_mb=1, refit_checksum=True)
    everyones = run(ranks, sample_update_refit, config)
    for found in everyones:
        assert found["fresh"]["logprob_diff_max"] < 1e-5
        assert found["stale"]["logprob_diff"] > 0.01
        assert found["refitted"]["logprob_diff_max"] < 1e-5
        assert found["versions"] == {3}
        assert contents(found["greedy"]) == contents(found["embedded"])
        assert len({sample.token_ids for sample in found["greedy"]}) > 1
        assert contents(found["samples"]) == contents(everyones[0]["samples"])  # all of them on every rank
        # A request's random numbers do not depend on what it is sampled with.
        assert [s.token_ids for s in found["again"]] == [s.token_ids for s in found["samples"][:12]]
    samples: list[Sample] = everyones[0]["samples"]
    assert [s.prompt.id for s in samples] == [i for i in range(32) for _ in range(4)]
    assert [s.group for s in samples] == [5 + i for i in range(32) for _ in range(4)]
    assert len({s.token_ids for s in samples}) > 0.9 * len(samples)
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    assert all((s.token_ids[-1] == AsciiTokenizer.eos_id) == (s.finish_reason == "stop") for s in samples)
    assert everyones[0]["sync"].buckets > 1
    # All norms, and embedding and head where they are not split; the other weights are joined and packed.
    assert len(everyones[0]["copies"]) == (7 if tensor == 1 else 5)


def logprobs_before_and_after(config: RunConfig, vocab_size: int) -> list[dict[str, float]]:
    """The mismatch of the initial weights, of updated ones, and of updated ones with vLLM refitted."""
    with distributed(config):
        policy = Policy(config, vocab_size)
        engine = build_engine(policy, config.rollout, AsciiTokenizer(), seed=1)
        engine.refit()
        samples = engine.generate(make_prompts(), 2, 0.7)
        fresh = mismatch(policy, samples)
        update(policy, samples, 2)
        stale = mismatch(policy, samples)
        engine.refit()
        return [fresh, stale, mismatch(policy, engine.generate(make_prompts(), 2, 0.7))]


@pytest.mark.parametrize("name", ["llama-tied", "llama3-rope", "qwen2", "qwen3", "qwen3-moe"])
def test_models_of_hugging_face(name: str, tmp_path: Path) -> None:
    # vLLM pads experts of 48 to 64 on a CPU, and packs them.
    experts = {"moe_intermediate_size": 48} if name == "qwen3-moe" else {}
    write_model(name, tmp_path / name, hidden_size=128, head_dim=32, **experts)
    config = vllm_config(ModelConfig(hf_path=str(tmp_path / name), max_sequence_length=64), temperature=0.7)
    fresh, stale, refitted = run(1, logprobs_before_and_after, config, 131)[0]
    for found in (fresh, refitted):
        assert found["logprob_diff"] < 1e-5
        assert found["logprob_diff_max"] < 1e-4  # of logits that are far from 0
    assert stale["logprob_diff"] > 0.1


def refit_often(config: RunConfig, cycles: int) -> list[int]:
    """Resident bytes after each refit and some sampling, without what malloc keeps for later."""
    trim = ctypes.CDLL(None).malloc_trim
    sizes: list[int] = []
    with distributed(config):
        policy = Policy(config, VOCAB)
        engine = build_engine(policy, config.rollout, AsciiTokenizer(), seed=1)
        for _ in range(cycles):
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.mul_(1.01)
            engine.refit()
            engine.generate(make_prompts(8), 2, 1.0)
            gc.collect()
            trim(0)
            sizes.append(psutil.Process().memory_info().rss)
    return sizes


def test_memory_stays_flat_over_refits() -> None:
    # 50 MB: if one refit in two kept its weights, 50 of them would keep the size of the whole process.
    model = replace(LLAMA, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=8, num_layers=4)
    sizes = run(1, refit_often, vllm_config(model), 55)[0][5:]
    usual = float(np.median(sizes))
    assert 0.98 * usual < min(sizes)
    assert max(sizes) < 1.02 * usual
    assert np.median(sizes[-15:]) < 1.005 * np.median(sizes[:15])  # a megabyte a refit would show


def sample_many_and_few(config: RunConfig) -> tuple[list[Sample], list[Sample]]:
    rng = np.random.default_rng(4)
    prompts = [Prompt(i, "", tuple(rng.integers(VOCAB, size=48).tolist()), {}) for i in range(128)]
    with distributed(config):
        engine = build_engine(Policy(config, VOCAB), config.rollout, AsciiTokenizer(), seed=1)
        engine.refit()
        return engine.generate(prompts, 1, 1.0), engine.generate(prompts[80:90], 1, 1.0)


def test_prompts_beyond_the_tokens_of_one_forward_pass() -> None:
    # vLLM's limit is 4,096. A prompt that is split there would draw one random number more, and on a CPU end the run.
    many, few = run(1, sample_many_and_few, vllm_config(batch_size=128))[0]
    assert sum(len(sample.prompt.token_ids) for sample in many) == 6144
    assert [sample.token_ids for sample in many[80:90]] == [sample.token_ids for sample in few]


def sample_from_the_top(config: RunConfig) -> list[Sample]:
    """64 responses a prompt, from the top 3."""
    with distributed(config):
        policy = Policy(config, VOCAB)
        engine = VllmEngine(PolicyWeights(policy), config.model, config.rollout, AsciiTokenizer(), seed=1)
        engine.refit()
        return engine.generate(make_prompts(4), 64, 1.0)


def test_top_k_keeps_to_the_top() -> None:
    top = run(1, sample_from_the_top, vllm_config(top_k=3))[0]
    for i in range(4):
        first = {sample.token_ids[0] for sample in top[64 * i : 64 * (i + 1)]}
        assert len(first) == 3
    of_three = np.concatenate([s.rollout_logprobs for s in top if s.rollout_logprobs is not None])
    assert len(of_three) > 1000
    assert abs(of_three.mean() + np.log(3)) < 0.1  # of what is left: nearly even, in a model of random weights


def check_behind_its_back(config: RunConfig) -> tuple[Verdict, Verdict]:
    with distributed(config):
        policy = Policy(config, VOCAB)
        engine = build_engine(policy, config.rollout, AsciiTokenizer(), seed=1)
        engine.refit()
        sound = check_rollout(policy, engine, make_prompts(), config)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.1)
        return sound, check_rollout(policy, engine, make_prompts(), config)


def test_the_check_finds_stale_weights() -> None:
    sound, stale = run(1, check_behind_its_back, vllm_config())[0]
    assert sound.causes == ()
    assert "verdict: the engine samples from the policy" in str(sound)
    assert len(stale.causes) == 1
    assert stale.causes[0].startswith("stale weights")


def test_a_training_run(tmp_path: Path) -> None:
    config = replace(
        vllm_config(ModelConfig(hidden_size=128, ffn_hidden_size=192), prompts_per_step=4, responses_per_prompt=4),
        output_dir=str(tmp_path),
        train=TrainConfig(steps=2, mini_batch_prompts=2, epochs=1, max_tokens_per_micro_batch=1024),
        eval=EvalConfig(responses_per_prompt=1),
    )
    config = replace(
        config,
        rollout=replace(config.rollout, dynamic_sampling=False),
        data=replace(config.data, eval_prompts=8),
    )
    run(2, train_in_a_world, config)
    from megatron_aspo.run_log import read_metrics

    steps = [line for line in read_metrics(tmp_path / "test") if line["phase"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["mismatch/logprob_diff_max"] < 1e-5 for line in steps)


def train_in_a_world(config: RunConfig) -> None:
    with distributed(config):
        train(config, [])
