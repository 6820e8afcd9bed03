"""Checks 21 and 22: one update at every layout against one GPU's; experts drawn at random."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import torch

from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.training import OptimizerConfig
from megatron_aspo.ranks.gathering import gather_objects
from megatron_aspo.tools.gpu_check import lab as tools
from megatron_aspo.tools.gpu_check.records import ANY, Lab, Numbers, check

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one GPU, D": ("D", 1, {}),
    "one GPU, M": ("M", 1, {}),
    "one GPU, L": ("L", 1, {}),
    "overlapped": ("D", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "CP 2": ("D", 2, {"context": 2}),
    "PP 4": ("D", 4, {"pipeline": 4}),
    "EP 4, PP 2, latent": ("L", 8, {"pipeline": 2, "expert": 4}),
    "TP 8": ("D", 8, {"tensor": 8, "sequence_parallel": True}),
    "TP 2, PP 2 of two chunks": (
        "D",
        8,
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence_parallel": True, "overlap_grad_reduce": True},
    ),
    "CP 4, TP 2": ("D", 8, {"context": 4, "tensor": 2, "sequence_parallel": True}),
    "EP 8": ("M", 8, {"expert": 8}),
    "EP 4, ETP 2": ("M", 8, {"tensor": 2, "sequence_parallel": True, "expert": 4, "expert_tensor": 2}),
}
"""Name -> (model, GPUs, layout)."""


def step(lab: Lab) -> Numbers:
    """Loss and gradient norm of an update whose old log-probs are shifted by a function of the token alone."""
    model, _, layout = CASES[os.environ["GPU_CHECK_CASE"]]
    frozen = OptimizerConfig(lr=1e-30, lr_warmup_updates=0, weight_decay=0.0)
    config = tools.run_config(lab, model, parallel=ParallelConfig(**layout), optimizer=frozen)
    with tools.open_policy(lab, config) as policy:
        batches = policy.pack(tools.make_samples(lab, config, 16))
        tools.set_old_logprobs(policy, batches)
        first = tools.take_update(policy, batches)["log_ratio_max_first"]
        for batch in batches:
            if batch.old_logprobs is not None:
                batch.old_logprobs += 0.1 * torch.sin(batch.labels.float())
        metrics = tools.take_update(policy, batches)
    return {"log r": first, "loss": metrics["value"], "grad norm": metrics["grad_norm"]}


def layout(lab: Lab) -> Numbers:
    """One update, compared with one GPU's on the same samples and weights."""
    case = os.environ["GPU_CHECK_CASE"]
    model, ranks, settings = CASES[case]
    file = lab.path / f"layout-{model}.json"
    if ranks == 1:
        numbers = step(lab)
        file.write_text(json.dumps(numbers))
        return numbers | {"loss error": 0.0, "grad norm error": 0.0}
    config = tools.run_config(lab, model, parallel=ParallelConfig(**settings))
    numbers, alone = tools.on_ranks(lab, f"{__name__}:step", config, ranks), json.loads(file.read_text())
    errors = {f"{name} error": abs(numbers[name] / alone[name] - 1) for name in ("loss", "grad norm")}
    return numbers | errors


for _case, (_model, _gpus, _) in CASES.items():
    check(
        f"21 {_case}",
        20 if _gpus == 1 else 45,
        {"loss error": (0, 3e-3), "grad norm error": (0, 3e-3), "log r": (0, 1e-5), "loss": ANY, "grad norm": ANY},
        gpus=max(_gpus, 2),  # nothing to compare with on a single GPU
        after="" if _gpus == 1 else f"21 one GPU, {_model}",
        on_cpu=_gpus <= 2,
        environment={"GPU_CHECK_CASE": _case},
    )(layout)


def experts_of_rank(lab: Lab) -> Numbers:
    """Ranks whose randomly drawn experts differ from all others'."""
    dtype: Any = "float32" if lab.small else "bfloat16"
    ranks = int(os.environ["WORLD_SIZE"])
    model = ModelConfig(num_experts=8, moe_ffn_hidden_size=64, dtype=dtype, max_sequence_length=tools.longest(lab))
    config = replace(tools.run_config(replace(lab, bare=True)), model=model, parallel=ParallelConfig(expert=ranks))
    with tools.open_policy(replace(lab, bare=True), config) as policy:
        weights = [p.double().sum() for name, p in policy.model.named_parameters() if "experts.l" in name]
        sums = gather_objects([float(weight) for weight in weights])
    return {"different": len({tuple(each) for each in sums}) / ranks, "weights": len(sums[0])}


@check("22 random experts", 40, {"different": (1, 1), "weights": (1, 1e6)}, gpus=8, on_cpu=True)
def random_experts(lab: Lab) -> Numbers:
    """Random weights of experts at EP 8."""
    ranks = 8 if lab.device == "cuda" else 2
    config = tools.run_config(replace(lab, bare=True), parallel=ParallelConfig(expert=ranks))
    return tools.on_ranks(lab, f"{__name__}:experts_of_rank", config, ranks)
