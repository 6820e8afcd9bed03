"""Checks 5 to 9: attention, log-probs, first ratio, launches and FP8 of Transformer Engine's layers in a model."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from megatron_aspo.config.fp8 import Fp8Config
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.tools.gpu_check import lab as tools
from megatron_aspo.tools.gpu_check.records import ANY, Lab, Numbers, check, keep_largest


@check(
    "5 backend",
    25,
    {"fused": (3, 3), "unfused": (0, 0), "slow streams": (0, 4)},
    environment={"NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "1"},
)
def attention_backend(lab: Lab) -> Numbers:
    """The attention kernel of each model; a stream that is five times faster when repeated had made a new plan."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("DotProductAttention")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    found: Numbers = {"fused": 0, "unfused": 0}
    for model in tools.MODELS:
        config = tools.run_config(lab, model)
        with tools.open_policy(lab, config) as policy:
            slow = 0
            for i, segments in enumerate((1, 7, 40) + 20 * (0,)):
                length = tools.longest(lab) // segments if segments else 0
                (batch, *_) = policy.pack(tools.make_samples(lab, config, segments or 8, i, length))
                first, again = (_seconds(policy, batch) for _ in range(2))
                slow += i > 2 and first > 5 * again
            keep_largest(found, {"slow streams": slow})
        found["fused"] += "Running with FusedAttention" in " ".join(lines)
        found["unfused"] += sum(line.startswith("Running with") and "FusedAttention" not in line for line in lines)
        lines.clear()
    return found


def _seconds(policy: Any, batch: Any) -> float:
    start = time.perf_counter()
    policy.logprobs([batch])[0].sum().item()
    return time.perf_counter() - start


@check(
    "6 truth",
    25,
    {"D: mean": (0, 0.02), "D: largest": (0, 0.3), "M: mean": (0, 0.06), "L: mean": (0, 0.06)},
    on_cpu=True,
)
def truth(lab: Lab) -> Numbers:
    """Errors of log-probs against transformers' in float32, a sequence at a time; experts may route differently."""
    from transformers import AutoModelForCausalLM

    found: Numbers = {}
    for model in tools.MODELS:
        config = tools.run_config(lab, model)
        with tools.open_policy(lab, config) as policy:
            batches = policy.pack(tools.make_samples(lab, config, 12))
            logprobs = policy.logprobs(batches)
        reference: Any = AutoModelForCausalLM.from_pretrained(config.model.hf_path, dtype=torch.float32)
        reference.to(lab.device)
        errors: list[torch.Tensor] = []
        for batch, values in zip(batches, logprobs, strict=True):
            for start, end in pairwise(batch.cu_seqlens.tolist()):
                inside, labels = batch.loss_mask[start:end].bool(), batch.labels[start:end]
                with torch.no_grad():
                    exact = reference(batch.tokens[None, start:end]).logits[0].log_softmax(-1)
                errors.append((values[start:end] - exact.gather(1, labels[:, None])[:, 0])[inside].abs())
        error = torch.cat(errors)
        found |= {f"{model}: mean": float(error.mean()), f"{model}: largest": float(error.max())}
    return found


_STEP: dict[str, tuple[float, float]] = {"log r": (0, 1e-5), "old log-probs differ": (0, 0), "grad norm": (1e-6, 1e6)}


def _first_ratio(lab: Lab, model: str, train: TrainConfig, fp8: Fp8Config | None = None) -> Numbers:
    """Largest |log r| before an update, in five passes; elements that differ between two passes for old log-probs."""
    config = tools.run_config(lab, model, train=train, fp8=fp8 or Fp8Config())
    found: Numbers = {}
    with tools.open_policy(lab, config) as policy:
        batches = policy.pack(tools.make_samples(lab, config, 12))
        for _ in range(5):
            tools.set_old_logprobs(policy, batches)
            again = zip(policy.logprobs(batches), batches, strict=True)
            differing = sum(int((x != batch.old_logprobs).sum()) for x, batch in again)
            metrics = tools.take_update(policy, batches)
            numbers = {"log r": metrics["log_ratio_max_first"], "grad norm": metrics["grad_norm"]}
            keep_largest(found, numbers | {"old log-probs differ": differing})
    return found


@check("7 first ratio", 35, _STEP, on_cpu=True)
def first_ratio(lab: Lab) -> Numbers:
    plain = tools.run_config(lab).train
    cases = [(model, plain) for model in tools.MODELS] + [("D", replace(plain, recompute="full"))]
    cases.append(("M", replace(plain, router_replay="trainer", recompute="full")))
    found: Numbers = {}
    for case in cases:
        keep_largest(found, _first_ratio(lab, *case))
    return found


@check("step with local layers", 30, _STEP, bare=True, on_cpu=True)
def local_step(lab: Lab) -> Numbers:
    """Log-probs and updates of a dense model from random weights."""
    bare = replace(lab, bare=True)
    return _first_ratio(bare, "", tools.run_config(bare).train)


@check("8 launches", 15, {"kernels a layer": (1, 60), "waits": (0, 4)})
def launches(lab: Lab) -> Numbers:
    """Kernels and waits of the host in one micro-batch of 40 segments, forward."""
    config = tools.run_config(lab)
    with tools.open_policy(lab, config) as policy:
        batches = policy.pack(tools.make_samples(lab, config, 40, length=tools.longest(lab) // 40))[:1]
        tools.set_old_logprobs(policy, batches)
        tools.take_update(policy, batches)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            policy.logprobs(batches)[0].sum()
        events: list[Any] = list(profile.key_averages())
    counts = {event.key: event.count for event in events}
    kernels = sum(count for name, count in counts.items() if "LaunchKernel" in name)
    waits = sum(count for name, count in counts.items() if name.startswith("cuda") and "Synchronize" in name)
    return {
        "kernels a layer": kernels / policy.transformer.num_layers,
        "waits": max(0, waits - 1),
    }  # the profiler's own


@check("9 FP8", 30, {"recipes": (0, 4), "log r": (0, 1e-5), "unmoved": (-1e3, -1e-4), "delayed log r": ANY})
def fp8(lab: Lab) -> Numbers:
    """Every recipe of this GPU on models D and M: the first ratio; whether updates move the log-probs."""
    recipes: Any = tools.fp8_recipes(lab)
    found: Numbers = {"recipes": len(recipes), "log r": 0.0, "delayed log r": 0.0, "unmoved": -1e3}
    for recipe in recipes:
        for model in ("D", "M"):
            config = tools.run_config(lab, model, fp8=Fp8Config(recipe=recipe))
            with tools.open_policy(lab, config) as policy:
                batches = policy.pack(tools.make_samples(lab, config, 12))
                tools.set_old_logprobs(policy, batches)
                metrics = tools.take_update(policy, batches)
                old = [batch.old_logprobs for batch in batches if batch.old_logprobs is not None]
                pairs = zip(policy.logprobs(batches), old, strict=True)
                moved = float(torch.stack([(new - logprobs).abs().max() for new, logprobs in pairs]).max())
            name = "delayed log r" if recipe == "delayed" else "log r"
            keep_largest(found, {name: metrics["log_ratio_max_first"], "unmoved": -moved})
    return found
