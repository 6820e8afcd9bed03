"""vLLM beside the trainer: equal log-probs before and after refits, the same stops as the embedded engine, constant
memory.

Starting vLLM takes seconds, so one engine serves several tests.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from ranks import VOCAB, everywhere, run, run_config, tiny_run
from tiny_models import write_model, write_published, write_with_vision

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.commands import train
from megatron_aspo.commands.check_rollout import check_rollout
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import OptimizerConfig, TrainConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.errors import RunError
from megatron_aspo.journal.log import read_metrics
from megatron_aspo.policy.metrics import UpdateMetrics, measure_mismatch
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.megatron import EmbeddedEngine
from megatron_aspo.rollout.stops import Stops
from megatron_aspo.rollout.vllm import VllmEngine
from megatron_aspo.rollout.vllm_start import model_of
from megatron_aspo.rollout.weight_sync import PolicyWeights, WeightSyncError, check_copies
from megatron_aspo.train import set_logprobs

pytestmark = pytest.mark.engines

# vLLM's attention on a CPU requires a head dimension of at least 32.
LLAMA = ModelConfig(hidden_size=128, ffn_hidden_size=192, max_sequence_length=64)
ROLLOUT = RolloutConfig(engine="vllm", max_response_tokens=12, batch_size=64, kv_cache_gb=0.1)
DELTA_NETS = ("qwen3-next", "qwen3.5-moe", "qwen3.6-moe")
EXPERTS = ("qwen3-moe", "glm4-moe", "glm4-moe-lite", "deepseek-v3", "kimi-k2", *DELTA_NETS)
LAYOUTS = {
    "alone": (1, ParallelConfig(), 1),
    "dp2": (2, ParallelConfig(), 1),
    "tp2 beside tp2": (2, ParallelConfig(tensor=2), 2),
    "tp1 beside tp2": (2, ParallelConfig(tensor=2), 1),
    "tp2 beside pp2": (2, ParallelConfig(pipeline=2), 2),
}


def vllm_config(model: ModelConfig = LLAMA, parallel: ParallelConfig | None = None, **rollout: Any) -> RunConfig:
    """A configuration whose updates visibly change every log-prob."""
    return run_config(
        parallel,
        model=model,
        rollout=replace(ROLLOUT, **rollout),
        optimizer=OptimizerConfig(lr=1e-2, lr_warmup_updates=0),
    )


def build(config: RunConfig, vocab_size: int = VOCAB) -> tuple[Policy, VllmEngine]:
    policy, routes = Policy(config, vocab_size), config.train.router_replay == "sampler"
    source = PolicyWeights(policy)
    return policy, VllmEngine(source, config.model, config.rollout, AsciiTokenizer(), seed=1, routes=routes)


def make_prompts(count: int = 32) -> list[Prompt]:
    rng = np.random.default_rng(3)
    return [
        Prompt(i, "", tuple(rng.integers(VOCAB, size=length).tolist()), {})
        for i, length in enumerate(rng.integers(3, 20, size=count))
    ]


def mismatch(policy: Policy, samples: list[Sample]) -> dict[str, float]:
    batches = policy.pack(samples)
    set_logprobs(policy, [batches])
    return measure_mismatch([batches])


def update_between_refits(policy: Policy, engine: VllmEngine, prompts: list[Prompt], copies: int) -> dict[str, Any]:
    """Samples, their mismatch with the initial weights and after three updates, and the mismatch after a refit."""
    temperature = engine.config.temperature
    engine.refit()
    samples = engine.generate(prompts, copies, temperature, first_group=5)
    result: dict[str, Any] = {"samples": everywhere(samples), "fresh": mismatch(policy, samples)}
    for i, sample in enumerate(samples):
        sample.advantage = 1.0 if i % 2 else -1.0
    batches = policy.pack(samples)
    set_logprobs(policy, [batches])
    metrics = UpdateMetrics()
    for _ in range(3):
        policy.train_step(batches, PolicyLossConfig(), metrics)
    result["stale"] = mismatch(policy, samples)
    with pytest.raises(WeightSyncError, match="version 0 and the policy version 3"):
        engine.generate(prompts[:1], 1, temperature)
    engine.refit()
    later = engine.generate(prompts, copies, temperature)
    return result | {"refitted": mismatch(policy, later), "versions": {sample.weight_version for sample in later}}


def sample_update_refit(config: RunConfig, draw: bool) -> dict[str, Any]:
    """Results from one engine: samples, refusals and mismatches before and after updates and refits."""
    with distributed(config):
        policy, engine = build(config)
        with pytest.raises(WeightSyncError, match="refit was not called"):
            engine.generate(make_prompts(1), 1, 1.0)
        engine.refit()
        again = everywhere(engine.generate(make_prompts()[:3], 4, 1.0))
        results = {"again": again, **update_between_refits(policy, engine, make_prompts(), 4)}
        results["greedy"] = everywhere(engine.generate(make_prompts(), 1, 0.0))
        embedded = EmbeddedEngine(policy, config.rollout, AsciiTokenizer(), 1)
        results["embedded"] = everywhere(embedded.generate(make_prompts(), 1, 0.0))
        if draw:
            engine.config = replace(engine.config, request_seeds=False)
            results["drawn"] = sample_between_draws(policy, engine)
        results["copies"] = engine._copies()
        with torch.no_grad():
            model_of(engine._llm).get_parameter("model.norm.weight")[3] += 1e-3
        with pytest.raises(WeightSyncError, match=r"1 of \d+ tensors .*: model.norm.weight"):
            check_copies(engine.sent_checksums, engine._copies(), "in vLLM")
        part = "model.layers.1.self_attn.k_proj.weight"  # vLLM fuses it with the queries and values
        weights = [(name, tensor.clone()) for name, tensor in engine.source.weights() if name != part]
        engine.source.weights = lambda: iter(weights)
        with pytest.raises(WeightSyncError, match=rf"^1 of \d+ tensors are missing.*: {part}$"):
            engine.refit()
    return results


def sample_between_draws(policy: Policy, engine: VllmEngine) -> dict[str, Any]:
    """Samples of an engine without seeds per request, whose ranks' generators are in different states."""
    results: dict[str, Any] = {}
    prompts = make_prompts(16)
    torch.manual_seed(100 + torch.distributed.get_rank())
    np.random.seed(100 + torch.distributed.get_rank())
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
    samples = engine.generate(prompts, 4, 1.0)
    after = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
    results["untouched"] = torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1])
    results["samples"] = contents(samples)
    results["mismatch"] = mismatch(policy, samples)
    results["others"] = contents(engine.generate(prompts[8:], 4, 1.0, first_group=8))
    torch.manual_seed(0)
    results["again"] = contents(engine.generate(prompts, 4, 1.0))
    with torch.no_grad():  # equal weights under different versions, so that only the draws differ
        for parameter in policy.model.parameters():
            parameter.zero_()
    for version in ("next", "last"):
        policy.weight_version += 1
        engine.refit()
        results[version] = contents(engine.generate(prompts, 4, 1.0))
    return results


def contents(samples: list[Sample]) -> list[tuple[Any, ...]]:
    samples = everywhere(samples) if torch.distributed.is_initialized() else samples
    return [(s.prompt.id, s.group, tuple(s.token_ids.tolist()), s.finish_reason) for s in samples]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_greedy_responses_are_the_trainers_before_and_after_updates(layout: str) -> None:
    ranks, parallel, tensor = LAYOUTS[layout]
    config = vllm_config(parallel=parallel, tensor=tensor, refit_bucket_mb=1, refit_checksum=True)
    draw = parallel.tensor == tensor == 2
    by_rank = run(ranks, sample_update_refit, config, draw)
    if draw:
        check_draws(*(result["drawn"] for result in by_rank))
    for result in by_rank:
        assert result["fresh"]["logprob_diff_max"] < 1e-5
        assert result["stale"]["logprob_diff"] > 0.01
        assert result["refitted"]["logprob_diff_max"] < 1e-5
        assert result["versions"] == {3}
        assert contents(result["greedy"]) == contents(result["embedded"])
        assert len({tuple(sample.token_ids) for sample in result["greedy"]}) > 1
        assert contents(result["samples"]) == contents(by_rank[0]["samples"])  # every rank holds all samples
        # A request's random numbers do not depend on the rest of its batch.
        assert [s.token_ids.tolist() for s in result["again"]] == [s.token_ids.tolist() for s in result["samples"][:12]]
    samples: list[Sample] = by_rank[0]["samples"]
    assert [s.prompt.id for s in samples] == [i for i in range(32) for _ in range(4)]
    assert [s.group for s in samples] == [5 + i for i in range(32) for _ in range(4)]
    assert len({tuple(s.token_ids) for s in samples}) > 0.9 * len(samples)
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    assert all((s.token_ids[-1] == AsciiTokenizer.eos_id) == (s.finish_reason == "stop") for s in samples)
    # Copies: all norms, and embedding and head if they are not sharded. The other weights are fused and packed.
    assert len(by_rank[0]["copies"]) == (7 if tensor == 1 else 5)


def check_draws(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Check that draws depend on weights and prompts alone, and agree on both ranks of a replica."""
    assert first == second
    assert first["mismatch"]["logprob_diff_max"] < 1e-5
    assert first["untouched"]
    assert first["again"] == first["samples"]  # independent of earlier draws, as in a resumed run
    assert first["others"] != first["samples"][32:]  # drawn per call, not per request
    assert first["next"] != first["last"]  # later steps draw anew
    responses = [token_ids for _, _, token_ids, _ in first["samples"]]
    assert len(set(responses)) > len(responses) / 2


def refit_from_hugging_face(config: RunConfig) -> dict[str, Any]:
    # With AMX vLLM's latent attention discards a weight that a refit would renew; the reference kernel keeps it.
    torch.cpu._is_amx_tile_supported = lambda: False
    with distributed(config):
        policy, engine = build(config, vocab_size=131)
        model = engine._llm.llm_engine.model_config
        result = update_between_refits(policy, engine, make_prompts(), 2)
        mtp_layers = getattr(model.hf_config, "num_nextn_predict_layers", 0)
        routes = [engine.generate(make_prompts(), 1, 1.0) for _ in range(config.train.router_replay == "sampler")]
        result["rerouted"] = [rerouted(policy, samples) for samples in routes]
        return result | {"quantization": model.quantization, "mtp layers": mtp_layers}


def rerouted(policy: Policy, samples: list[Sample]) -> tuple[int, int]:
    """Rows of the sampler's routes, and how many of them the trainer's routers choose otherwise."""
    batches, free = policy.pack(samples), policy.pack([replace(sample, routes=None) for sample in samples])
    set_logprobs(policy, [free])
    rows = other = 0
    for sampler, trainer in zip(batches, free, strict=True):
        for theirs, ours in zip(sampler.routing or [], trainer.routing or [], strict=True):
            known = [theirs[sampler.loss_positions].long(), ours[sampler.loss_positions].long()]
            rows += len(known[0])
            other += int((known[0].sort(1)[0] != known[1].sort(1)[0]).any(1).sum())
    return rows, other


LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
"""What vLLM's kernel for latent attention on a CPU supports."""


def write_for_vllm(name: str, folder: Path) -> None:
    """Write a tiny model with sizes for which vLLM has kernels on a CPU."""
    shared = {"shared_expert_intermediate_size": 48} if name in DELTA_NETS else {}
    # vLLM pads experts of 48 to 64 on a CPU, and packs them.
    sizes = {"hidden_size": 128, "head_dim": 32} | ({"moe_intermediate_size": 48} | shared if name in EXPERTS else {})
    if name == "deepseek-v3":  # published in FP8 with an MTP layer; vLLM must sample with the policy's weights alone
        write_published(folder, folder.parent / "meant", **LATENT)
    elif name in ("glm4-moe-lite", "kimi-k2"):
        write_model(name, folder, **LATENT)
    elif name == "qwen3.6-moe":  # published with a vision encoder and MTP
        write_with_vision(name, folder, **sizes)
    else:
        write_model(name, folder, **sizes)


@pytest.mark.parametrize("name", ["llama-tied", "llama3-rope", "qwen2", "qwen3", "mistral", "qwen3.5", *EXPERTS])
def test_models_of_hugging_face(name: str, tmp_path: Path) -> None:
    write_for_vllm(name, tmp_path / name)
    config = vllm_config(ModelConfig(hf_path=str(tmp_path / name), max_sequence_length=64), temperature=0.7)
    has_experts = name in EXPERTS
    if has_experts:
        config = replace(config, train=replace(config.train, router_replay="sampler"))
    (result,) = run(1, refit_from_hugging_face, config)
    for numbers in (result["fresh"], result["refitted"]):
        assert numbers["logprob_diff"] < 1e-5
        assert numbers["logprob_diff_max"] < 1e-4  # of logits that are far from 0
    assert result["stale"]["logprob_diff"] > 0.1
    assert (result["quantization"], result["mtp layers"]) == (None, 0)
    for rows, other in result["rerouted"]:
        assert rows > 200
        assert other == 0
    assert len(result["rerouted"]) == has_experts


def test_gated_delta_nets_in_tensor_parallel_vllm(tmp_path: Path) -> None:
    write_for_vllm("qwen3-next", tmp_path / "model")
    model = ModelConfig(hf_path=str(tmp_path / "model"), max_sequence_length=64)
    config = vllm_config(model, ParallelConfig(tensor=2, sequence_parallel=True), temperature=0.7, tensor=2)
    for result in run(2, refit_from_hugging_face, config):
        for numbers in (result["fresh"], result["refitted"]):
            assert numbers["logprob_diff"] < 1e-5
            assert numbers["logprob_diff_max"] < 1e-4
        assert result["stale"]["logprob_diff"] > 0.1


def refit_often(config: RunConfig, cycles: int) -> list[int]:
    """Resident bytes after each refit and some sampling, without memory that malloc keeps for later."""
    trim = ctypes.CDLL(None).malloc_trim
    sizes: list[int] = []
    with distributed(config):
        policy, engine = build(config)
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
    # The weights take 50 MB. A leak in every second of 50 refits would double the size of the process.
    model = replace(LLAMA, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=8, num_layers=4)
    sizes = run(1, refit_often, vllm_config(model), 55)[0][5:]
    usual = float(np.median(sizes))
    assert 0.98 * usual < min(sizes)
    assert max(sizes) < 1.02 * usual
    assert np.median(sizes[-15:]) < 1.005 * np.median(sizes[:15])  # detects a megabyte per refit


LENGTH = 40
STRINGS = ("abcab", "ccc", "bb")
EARLY = ("aa", "bb", "cc", "ab", "ba", "ac", "ca")


class Syllables(AsciiTokenizer):
    """A vocabulary whose tokens are one to three letters of "abc", so that most texts have many tokenizations."""

    vocab_size = VOCAB
    eos_id = 0
    eos_ids = (eos_id,)
    pad_id = 0

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.tokens = ["".join(rng.choice(list("abc"), size=rng.integers(1, 4))) for _ in range(VOCAB)]

    def decode(self, token_ids: Iterable[int], special: bool = False) -> str:
        return "".join(self.tokens[i] for i in token_ids if special or i)


def use_one_engine(config: RunConfig) -> dict[Any, Any]:
    """Long batches, top-k, the check of the engine, stop strings, a failure and refused weights."""
    rng = np.random.default_rng(4)
    prompts = [Prompt(i, "", tuple(rng.integers(VOCAB, size=48).tolist()), {}) for i in range(128)]
    with distributed(config):
        policy, engine = build(config)
        engine.refit()
        result: dict[Any, Any] = {
            "many": engine.generate(prompts, 1, 1.0),
            "few": engine.generate(prompts[80:90], 1, 1.0),
            "sound": check_rollout(policy, engine, make_prompts(), config),
        }
        engine.config = replace(config.rollout, top_k=3)
        result["top"] = engine.generate(make_prompts(4), 64, 1.0)

        engine.config, engine.tokenizer = replace(config.rollout, max_response_tokens=LENGTH), Syllables()
        short = [Prompt(i, "", tuple(range(1 + i, 5 + i)), {}) for i in range(32)]
        for sampler in (engine, EmbeddedEngine(policy, engine.config, Syllables(), seed=1)):
            for strings in ((), STRINGS):
                sampler._stops = Stops(Syllables(), strings)
                responses = sampler.generate(short, 1, 0.0), sampler.generate(short, 4, 1.0)
                result[type(sampler).__name__, bool(strings)] = responses
        llm_engine, steps = engine._llm.llm_engine, []
        step = llm_engine.step
        llm_engine.step = lambda: steps.append(1) or step()
        engine._stops = Stops(Syllables(), EARLY)
        result["early"] = engine.generate([Prompt(i, "", (1 + i,), {}) for i in range(8)], 2, 1.0)
        result["steps"] = len(steps)
        engine.generate(short[:1], 2, 1.0)  # vLLM would refuse to reset its prefix cache if a request were left

        engine.config = config.rollout
        with torch.no_grad():  # an update that does not raise the version
            for parameter in policy.model.parameters():
                parameter.mul_(1.1)
        result["stale"] = check_rollout(policy, engine, make_prompts(), config)
        fail_and_refuse(engine)
        return result


def fail_and_refuse(engine: VllmEngine) -> None:
    """A failure inside vLLM is a RunError with its first line; weights that do not fit are refused."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\n  in a frame of its own")

    runner: Any = CPUModelRunner
    runner.execute_model = out_of_memory
    with pytest.raises(RunError, match=r"^vLLM failed while sampling: RuntimeError: DefaultCPU.*memory$"):
        engine.generate(make_prompts(1), 1, 1.0)
    weights = [(name, tensor.clone()) for name, tensor in engine.source.weights()]
    engine.sent_checksums = {}  # as before the first refit
    for wrong, message in (
        ([*weights, ("model.layers.9.mlp.down_proj.weight", torch.ones(2))], "refuses the weights"),
        ([("model.norm.weight", torch.ones(3)), *weights], "refuses the weights"),
        (weights[1:], f"1 of vLLM's parameters got no weights: {weights[0][0]}"),
    ):
        engine.source.weights = lambda wrong=wrong: iter(wrong)
        with pytest.raises(WeightSyncError, match=message):
            engine.refit()
        assert engine.weight_version is None  # samples nothing with these weights


@pytest.fixture(scope="module")
def results() -> dict[Any, Any]:
    return run(1, use_one_engine, vllm_config(batch_size=128))[0]


def test_long_batches_top_k_and_the_check_of_the_engine(results: dict[Any, Any]) -> None:
    # vLLM computes at most 4,096 tokens at once. A prompt split at that limit would draw one more random number, and
    # end the run on a CPU.
    many, few, top = results["many"], results["few"], results["top"]
    assert sum(len(sample.prompt.token_ids) for sample in many) == 6144
    assert [s.token_ids.tolist() for s in many[80:90]] == [s.token_ids.tolist() for s in few]

    for i in range(4):
        assert len({sample.token_ids[0] for sample in top[64 * i : 64 * (i + 1)]}) == 3
    of_three = np.concatenate([sample.rollout_logprobs for sample in top])
    assert len(of_three) > 1000
    assert abs(of_three.mean() + np.log(3)) < 0.1  # of the truncated distribution, nearly uniform in a random model

    assert results["sound"].causes == ()
    (cause,) = results["stale"].causes
    assert cause.startswith("stale weights")


def ends_of(free: list[Sample]) -> list[tuple[int, str]]:
    """Expected length and finish reason of each response, from the definition alone."""
    tokenizer = Syllables()
    ends: list[tuple[int, str]] = []
    for sample in free:
        lengths = range(1, len(sample.token_ids) + 1)
        texts = (tokenizer.decode(sample.token_ids[:length], special=True) for length in lengths)
        hits = [n for n, text in zip(lengths, texts, strict=True) if any(string in text for string in STRINGS)]
        finish = "stop" if hits else sample.finish_reason
        ends.append((min(hits, default=len(sample.token_ids)), finish))
    return ends


def test_both_engines_end_at_the_same_token(results: dict[Any, Any]) -> None:
    for name in ("VllmEngine", "EmbeddedEngine"):
        for free, cut in zip(results[name, False], results[name, True], strict=True):
            assert [(len(s.token_ids), s.finish_reason) for s in cut] == ends_of(free)
            for whole, part in zip(free, cut, strict=True):
                assert part.token_ids.tolist() == whole.token_ids[: len(part.token_ids)].tolist()
                expected = whole.rollout_logprobs[: len(part.rollout_logprobs)]
                np.testing.assert_allclose(part.rollout_logprobs, expected, atol=1e-5)
        assert len({len(s.token_ids) for s in results[name, True][1]}) > 3
    greedy = (results[name, True][0] for name in ("VllmEngine", "EmbeddedEngine"))
    vllm, embedded = ([(s.token_ids.tolist(), s.finish_reason) for s in samples] for samples in greedy)
    assert vllm == embedded
    longest = max(len(sample.token_ids) for sample in results["early"])
    assert longest < LENGTH / 2
    assert longest <= results["steps"] <= longest + 2  # vLLM stops decoding at a stop string


PRODUCTS = ("self_attn.o_proj", "mlp.down_proj")  # vLLM fuses the other weights, and splits them over ranks by heads


def compare_with_fp8(engine: VllmEngine) -> dict[str, tuple[str, float, float]]:
    """For two products: the type, the largest error of a scale, and the relative error of the weights."""
    exact = {name: tensor.float() for name, tensor in engine.source.weights()}
    result: dict[str, tuple[str, float, float]] = {}
    for name in (f"model.layers.0.{product}" for product in PRODUCTS):
        linear = model_of(engine._llm).get_submodule(name)
        codes, scale = linear.get_parameter("weight").t(), linear.get_parameter("weight_scale")  # [out, in], [out, 1]
        whole = exact[f"{name}.weight"]
        part = whole.chunk(2, dim=1)[torch.distributed.get_rank()]
        of_whole = whole.abs().amax(1, keepdim=True) / 448  # over whole rows, not this rank's shard alone
        error = codes.float() * scale - part
        result[name] = (str(codes.dtype), float((scale / of_whole - 1).abs().max()), float(error.norm() / part.norm()))
    return result


def refit_in_fp8(config: RunConfig) -> dict[str, Any]:
    with distributed(config):
        policy, engine = build(config)
        engine.refit()
        first = compare_with_fp8(engine)
        result = update_between_refits(policy, engine, make_prompts(8), 2)
        return result | {"products": [first, compare_with_fp8(engine)], "copies": list(engine._copies())}


def test_fp8_weights_and_scales_follow_the_policy() -> None:
    model = replace(LLAMA, dtype="bfloat16", ffn_hidden_size=256)
    config = vllm_config(model, ParallelConfig(tensor=2), tensor=2, quantization="fp8", refit_checksum=True)
    for result in run(2, refit_in_fp8, config):
        for code, scale_error, error in (value for made in result["products"] for value in made.values()):
            assert code == "torch.float8_e4m3fn"
            assert scale_error < 1e-6
            assert 0.02 < error < 0.03  # E4M3 of normal data: 2.65 %
        assert 0.001 < result["fresh"]["logprob_diff"] < 0.02
        assert result["stale"]["logprob_diff"] > 0.1
        assert 0.001 < result["refitted"]["logprob_diff"] < 0.02
        # Tensors are compared with the sent values only if vLLM keeps their type: norms, but not FP8 weights.
        assert "model.layers.0.input_layernorm.weight" in result["copies"]
        assert not any(product in name for name in result["copies"] for product in PRODUCTS)


def test_a_bfloat16_policy_learns_from_responses_sampled_in_fp8(tmp_path: Path) -> None:
    config = tiny_run(
        tmp_path,
        model=replace(LLAMA, dtype="bfloat16", ffn_hidden_size=256),
        rollout=replace(ROLLOUT, quantization="fp8", prompts_per_step=8, responses_per_prompt=8),
        loss=PolicyLossConfig(rollout_correction="truncate", entropy_coef=0.1),  # a gradient where rewards are equal
        optimizer=OptimizerConfig(lr=1e-2, lr_warmup_updates=0),
        train=TrainConfig(steps=2, mini_batch_prompts=4, max_tokens_per_micro_batch=256),
    )
    run(1, train.run, replace(config, rollout=replace(config.rollout, dynamic_sampling=False)))
    steps = [record for record in read_metrics(tmp_path / "test") if record["phase"] == "train"]
    for step in steps:  # the second samples with the weights of the first one's updates
        assert step["optimizer/grad_norm"] > 0.01
        assert 0.002 < step["mismatch/logprob_diff"] < 0.02  # 0.0008 without FP8
        assert step["loss/log_ratio_max_first"] == 0  # the ratio is between two states of the trainer
        assert step["loss/rollout_kl"] == pytest.approx(step["mismatch/kl"], rel=0.01)  # weighed by the loss
    assert len(steps) == 2
