"""Checks 10, 14 to 20, 23, 24 and 29: vLLM beside the policy, on one GPU and on several."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_aspo.batch import Prompt
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.rollout.engine import Response, make_requests
from megatron_aspo.tools.gpu_check import lab as tools
from megatron_aspo.tools.gpu_check.records import ANY, Bounds, Lab, Numbers, check, keep_largest

CYCLES = "10+14+15+17 vLLM beside the policy"
BFLOAT16: Bounds = {"mean |d|": (0, 0.06), "KL": (0, 4e-3)}
FP8: Bounds = {"mean |d|": (0, 0.3), "KL": (0, 0.1)}
"""The limits of `megatron-aspo check-rollout`. Those of FP8 also hold for experts, which engines route differently."""
VLLM = RolloutConfig(engine="vllm", kv_cache_gb=4, responses_per_prompt=8, max_response_tokens=256, batch_size=64)


@contextlib.contextmanager
def _engine(lab: Lab, config: RunConfig) -> Iterator[tuple[Any, Any, float]]:
    """Policy, rollout engine before its first refit, and the seconds of its start."""
    from megatron_aspo.rollout.build import build_engine

    if lab.small:
        rollout = replace(config.rollout, kv_cache_gb=0.05, max_response_tokens=8, responses_per_prompt=2)
        config = replace(config, rollout=rollout)
    with tools.open_policy(lab, config) as policy:
        start = time.monotonic()
        engine = build_engine(policy, config.rollout, AsciiTokenizer(), config.seed)
        yield policy, engine, time.monotonic() - start


def _prompts(lab: Lab, config: RunConfig, count: int = 8, length: int = 0) -> list[Prompt]:
    """Prompts of random lengths, or all of half of `length`."""
    return [sample.prompt for sample in tools.make_samples(lab, config, count, length=length)]


def _mismatch(policy: Any, engine: Any, prompts: list[Prompt]) -> tuple[Numbers, list[Any]]:
    """Sampler against trainer and the sampler's speed; the samples."""
    start = time.monotonic()
    samples = engine.generate(prompts, policy.config.rollout.responses_per_prompt, 1.0)
    rate = sum(sample.response_length for sample in samples) / (time.monotonic() - start)
    return {**_compare(policy, samples)[0], "tokens/s": rate}, [sample.token_ids.tolist() for sample in samples]


def _compare(policy: Any, samples: list[Any]) -> tuple[Numbers, list[Any]]:
    """Sampler against trainer; the micro-batches."""
    from megatron_aspo.policy.metrics import measure_mismatch

    batches = policy.pack(samples)
    tools.set_old_logprobs(policy, batches)
    numbers = measure_mismatch([batches])
    return {"mean |d|": numbers["logprob_diff"], "KL": numbers["kl"]}, batches


def _continued(policy: Any, engine: Any, prompts: list[Prompt]) -> Numbers:
    """Responses that are interrupted after four tokens, when another one ends, and then go on, against the trainer."""
    last, *requests = make_requests(prompts, engine.config.responses_per_prompt, 0)
    almost = np.ones(engine.config.max_response_tokens - 4, np.int32)
    last = replace(last, prefix=Response(almost, almost.astype(np.float32), almost))
    *first, _ = engine.advance([*requests, last], 1.0, bool)
    pairs = [(q, r) for q, r in zip(requests, first, strict=True) if r.finish_reason is None]
    whole = engine.advance([replace(request, prefix=response) for request, response in pairs], 1.0)
    samples = [response.sample(request.prompt, 0, "") for (request, _), response in zip(pairs, whole, strict=True)]
    return {"continued |d|": _compare(policy, samples)[0]["mean |d|"], "interrupted": len(samples) / len(requests)}


def _update(lab: Lab, policy: Any) -> None:
    batches = policy.pack(tools.make_samples(lab, policy.config, 8))
    tools.set_old_logprobs(policy, batches)
    tools.take_update(policy, batches)
    policy.release_gradients()


def _caches(lab: Lab) -> set[Path]:
    """Folders of compiled code in a cache of these checks, which starts empty and is vLLM's from now on."""
    os.environ["VLLM_CACHE_ROOT"] = str(lab.path / "vllm")
    folder = lab.path / "vllm" / "torch_compile_cache"
    return {*folder.glob("*"), *folder.glob("torch_aot_compile/*")}


@check(
    CYCLES,
    60,
    {**BFLOAT16, "freed": (0.95, 1.2), "differs when repeated": (0, 0), "unchanged by updates": (0, 0.5)}
    | {"continued |d|": BFLOAT16["mean |d|"], "interrupted": (0.5, 1)}
    | {"other stream": (0, 0), "warnings": (0, 0), "start s": ANY, "tokens/s": ANY},
)
def cycles(lab: Lab) -> Numbers:
    """Three cycles of sleep, update and refit with checksums, where 30 % of the GPU are free at the start."""
    _caches(lab)
    train = replace(tools.run_config(lab).train, release_gradients=True)
    config = tools.run_config(lab, rollout=replace(VLLM, refit_checksum=True), train=train)
    ballast: Any = None
    if lab.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        ballast = torch.empty(max(0, free - int(0.3 * total)), dtype=torch.uint8, device="cuda")
    found: Numbers = {"differs when repeated": 0.0}
    with warnings.catch_warnings(record=True) as seen, _engine(lab, config) as (policy, engine, start):
        warnings.simplefilter("always")
        engine.refit()
        prompts = _prompts(lab, config)
        greedy = [sample.token_ids.tolist() for sample in engine.generate(_prompts(lab, config, 32, 32), 2, 0.0)]
        (lab.path / "vllm.json").write_text(json.dumps({"start": start, "greedy": greedy}))
        last: list[Any] = []
        for _ in range(3):
            torch.cuda.empty_cache()  # as vLLM does after it has freed its own
            free = torch.cuda.mem_get_info()[0] if lab.device == "cuda" else 0
            engine.sleep()
            freed = torch.cuda.mem_get_info()[0] - free if lab.device == "cuda" else 0
            _update(lab, policy)
            engine.refit()
            numbers, tokens = _mismatch(policy, engine, prompts)
            same = sum(a == b for a, b in zip(tokens, last, strict=False)) / len(tokens)
            last, (_, repeated) = tokens, _mismatch(policy, engine, prompts)
            keep_largest(found, numbers | {"unchanged by updates": same})
            found["differs when repeated"] += float(repeated != tokens)
        found |= _continued(policy, engine, prompts)
        weights = sum(parameter.nbytes for parameter in policy.model.parameters())
    del ballast
    cache = int(config.rollout.kv_cache_gb * (1 << 30))
    found |= {"freed": freed / (weights + cache), "start s": start}
    found["warnings"] = float(sum("AccumulateGrad" in str(warning.message) for warning in seen))
    on_gpu = lab.device == "cuda"
    found["other stream"] = float(on_gpu and torch.cuda.current_stream() != torch.cuda.default_stream())
    return found


@check("16 refit memory", 35, {"beyond / planned": (0, 1), **FP8})
def refit_memory(lab: Lab) -> Numbers:
    """Peak of a refit beyond live memory, of a bucket, two tensors and the largest layer, with latent attention."""
    config = tools.run_config(lab, "L", rollout=replace(VLLM, refit_bucket_mb=256))
    with _engine(lab, config) as (policy, engine, _):
        engine.refit()
        sizes: dict[str, int] = {}
        largest = 0
        for name, tensor in engine.source.weights():
            layer = name.split(".")[2] if ".layers." in name else name
            sizes[layer], largest = sizes.get(layer, 0) + tensor.nbytes, max(largest, tensor.nbytes)
        memory = tools.Memory(lab)
        before = memory.reset()
        engine.refit()
        beyond = memory.peak - before
        numbers, _ = _mismatch(policy, engine, _prompts(lab, config))
    return {"beyond / planned": beyond / ((256 << 20) + 2 * largest + max(sizes.values())), **numbers}


@check("18 FP8 sampler", 35, FP8)
def fp8_sampler(lab: Lab) -> Numbers:
    """vLLM's products in FP8 against the policy in bfloat16."""
    config = tools.run_config(lab, rollout=replace(VLLM, quantization="fp8"))
    with _engine(lab, config) as (policy, engine, _):
        engine.refit()
        return _mismatch(policy, engine, _prompts(lab, config))[0]


@check(
    "19 second start",
    25,
    {"of the first's seconds": (0, 0.8), "caches": (1, 99), "new caches": (0, 0)},
    after=CYCLES,
)
def second_start(lab: Lab) -> Numbers:
    """The compiler's cache serves a second start."""
    before = _caches(lab)
    with _engine(lab, tools.run_config(lab, rollout=replace(VLLM, refit_checksum=True))) as (_, _, seconds):
        first = json.loads((lab.path / "vllm.json").read_text())["start"]
    new = len(_caches(lab) - before)
    return {"of the first's seconds": seconds / first, "caches": len(before), "new caches": new}


@check(
    "20 embedded engine",
    20,
    {"ms a position": (0, 50), "first tokens agree": (0.8, 1), **BFLOAT16},
    after=CYCLES,
)
def embedded(lab: Lab) -> Numbers:
    """Sampling from the training model; greedy tokens are vLLM's."""
    config = tools.run_config(lab, rollout=RolloutConfig(max_response_tokens=128, responses_per_prompt=2))
    theirs = json.loads((lab.path / "vllm.json").read_text())["greedy"]
    with _engine(lab, config) as (policy, engine, _):
        # Kernels are compiled before the measurement; what is made anew for each number of keys is within it.
        numbers, _ = _mismatch(policy, engine, _prompts(lab, config, 32, 512))
        prompts = _prompts(lab, config, 32, 32)
        start = time.monotonic()
        ours = [sample.token_ids.tolist() for sample in engine.generate(prompts, 2, 0.0)]
        seconds = time.monotonic() - start
    agree = sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True)) / len(theirs)
    return {"ms a position": 1e3 * seconds / max(map(len, ours)), "first tokens agree": agree, **numbers}


_TENSOR = [("D", 2, "True"), ("D", 2, "False"), ("M", 4, "True"), ("D", 8, "True")]


def tensor_rank(lab: Lab) -> Numbers:
    """One rank: two refits with a sleep between, of vLLM over as many GPUs as the policy."""
    ranks = int(os.environ["WORLD_SIZE"])
    parallel, rollout = ParallelConfig(tensor=ranks, sequence_parallel=True), replace(VLLM, tensor=ranks)
    config = tools.run_config(lab, os.environ["GPU_CHECK_CASE"], parallel=parallel, rollout=rollout)
    with _engine(lab, config) as (policy, engine, _):
        engine.refit()
        engine.sleep()
        _update(lab, policy)
        engine.refit()
        numbers, _ = _mismatch(policy, engine, _prompts(lab, config))
        free, total = torch.cuda.mem_get_info() if lab.device == "cuda" else (0, 0)
        beside = total - free - (torch.cuda.memory_reserved() if lab.device == "cuda" else 0)
        return {**numbers, "GiB beside torch": beside / (1 << 30)}


def tensor(lab: Lab) -> Numbers:
    """vLLM over several GPUs, with CUDA graphs."""
    ranks = len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) if lab.device == "cuda" else 2
    parallel = ParallelConfig(tensor=ranks, sequence_parallel=True)
    config = tools.run_config(lab, os.environ["GPU_CHECK_CASE"], parallel=parallel)
    return tools.on_ranks(lab, f"{__name__}:tensor_rank", config, ranks)


for _model, _ranks, _expandable in _TENSOR:
    check(
        f"{'23+24' if _ranks == 8 else '23'} vLLM TP {_ranks}, {_model}, expandable {_expandable}",
        90,
        {**(BFLOAT16 if _model == "D" else FP8), "GiB beside torch": ANY},
        gpus=_ranks,
        on_cpu=_ranks == 2 and _expandable == "True",
        environment={"GPU_CHECK_CASE": _model, "PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{_expandable}"},
    )(tensor)


_ROUTES: Bounds = {**BFLOAT16, "alike": (0.7, 1), "free |d|": ANY, "replayed / shifted": (0, 0.5)}


def routes_rank(lab: Lab) -> Numbers:
    """One rank: the same samples with the sampler's experts, with the trainer's, and with those of the token before."""
    ranks = int(os.environ["WORLD_SIZE"])
    parallel, rollout = ParallelConfig(tensor=ranks, sequence_parallel=ranks > 1), replace(VLLM, tensor=ranks)
    config = tools.run_config(lab, os.environ["GPU_CHECK_CASE"], parallel=parallel, rollout=rollout)
    config = replace(config, train=replace(config.train, router_replay="sampler"))
    with _engine(lab, config) as (policy, engine, _):
        engine.refit()
        samples = engine.generate(_prompts(lab, config), engine.config.responses_per_prompt, 1.0)
        replayed, batches = _compare(policy, samples)
        free, own = _compare(policy, [replace(sample, routes=None) for sample in samples])
        moved = [replace(s, routes=None if s.routes is None else np.roll(s.routes, 1, 0)) for s in samples]
        shifted, _ = _compare(policy, moved)
        same: list[torch.Tensor] = []
        for batch, alone in zip(batches, own, strict=True):
            rows = batch.loss_mask.chunk(ranks)[policy.tp_group.rank()]
            for theirs, ours in zip(batch.routing, alone.routing, strict=True):
                pairs = theirs[rows].long().sort(1)[0] == ours[rows].long().sort(1)[0]
                same.append(pairs.all(1).float())
    found = {"alike": float(torch.cat(same).mean()), "free |d|": free["mean |d|"]}
    return {**replayed, **found, "replayed / shifted": replayed["mean |d|"] / shifted["mean |d|"]}


def routes(lab: Lab) -> Numbers:
    """The experts that vLLM returns are those of its log-probs, row by row: over one GPU with dense first layers, and
    over two, where only the first rank gets them."""
    ranks = len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) if lab.device == "cuda" else 2
    config = tools.run_config(lab, os.environ["GPU_CHECK_CASE"], parallel=ParallelConfig(tensor=ranks))
    return tools.on_ranks(lab, f"{__name__}:routes_rank", config, ranks)


for _model, _ranks in (("L", 1), ("M", 2)):
    check(
        f"29 vLLM's experts, TP {_ranks}, {_model}",
        45,
        _ROUTES,
        gpus=_ranks,
        on_cpu=_ranks == 2,
        environment={"GPU_CHECK_CASE": _model},
    )(routes)
