"""Checks 11 to 13: resuming to the bit, and the memory of a checkpoint on the device and on the host."""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from typing import Any

import torch

from megatron_aspo.config.fp8 import Fp8Config
from megatron_aspo.config.training import CheckpointConfig, OptimizerConfig
from megatron_aspo.tools.gpu_check import lab as tools
from megatron_aspo.tools.gpu_check.records import Lab, Numbers, check, keep_largest


@check(
    "11 resume",
    40,
    {"cases": (1, 8), "largest difference": (0, 0), "miscounted updates": (0, 0)},
    on_cpu=True,
    environment={"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"},
)
def resume(lab: Lab) -> Numbers:
    """Six updates, and three, a checkpoint and three, with every kind of optimizer state. An update more is taken while
    the checkpoint is written."""
    base = OptimizerConfig(lr=1e-3, lr_warmup_updates=0)
    states = [base, replace(base, moments_dtype="bfloat16")] + [replace(base, cpu_offload=x) for x in (0.5, 1.0)]
    formats = [Fp8Config(), Fp8Config(recipe="delayed")] if "delayed" in tools.fp8_recipes(lab) else [Fp8Config()]
    found: Numbers = {"cases": 0.0}
    for optimizer in states[: 1 if lab.small else None]:
        for fp8 in formats:
            whole, counts = _updates(lab, optimizer, fp8, 6)
            _updates(lab, optimizer, fp8, 3, save=True)
            resumed, counts_after = _updates(lab, optimizer, fp8, 3, load=True)
            different = [float((a - b).abs().max()) for a, b in zip(whole, resumed, strict=True)]
            found["cases"] += 1
            for value in different:
                keep_largest(found, {"largest difference": value})
            for count in counts + counts_after:
                keep_largest(found, {"miscounted updates": abs(count - 6)})
    return found


def _updates(
    lab: Lab, optimizer: OptimizerConfig, fp8: Fp8Config, count: int, save: bool = False, load: bool = False
) -> tuple[list[torch.Tensor], list[float]]:
    """Weights after some updates, and the numbers of updates that the optimizers have counted."""
    from megatron_aspo.policy import checkpoint

    lab, folder = replace(lab, bare=True), lab.path / "resume"
    config = tools.run_config(lab, optimizer=optimizer, fp8=fp8)
    if not lab.small:
        shape = {"num_layers": 2, "hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 4}
        config = replace(config, model=replace(config.model, **shape, num_query_groups=2))
    with tools.open_policy(lab, config) as policy:
        batches = policy.pack(tools.make_samples(lab, config, 4, 0, tools.longest(lab) // 4))
        if load:
            checkpoint.load(folder / "step_000001", policy)
        for _ in range(count):
            tools.set_old_logprobs(policy, batches)
            tools.take_update(policy, batches)
        if save:
            saver = checkpoint.Saver(folder, CheckpointConfig(keep=1, asynchronous=True))
            saver.save(1, policy, {}, (), wait=False)
            tools.take_update(policy, batches)
            while not saver.published():
                time.sleep(0.01)
        chained: list[Any] = [part.optimizer for part in policy.optimizer.chained_optimizers]
        inner = [part for each in chained for part in getattr(each, "sub_optimizers", [each])]
        steps: list[float] = []
        for each in inner:  # AdamW counts in its states, FusedAdam in its groups
            states = [float(state["step"]) for state in each.state.values() if "step" in state]
            steps += states or [float(group["step"]) for group in each.param_groups if "step" in group]
        return [p.detach().float().cpu() for p in policy.model.parameters()], steps


@check(
    "12+13 memory of a checkpoint",
    25,
    {"released": (3.9, 4.1), "restored": (3.9, 4.1), "save": (0, 2), "load": (0, 6), "host": (0, 30)},
    bare=True,
    on_cpu=True,
)
def checkpoint_memory(lab: Lab) -> Numbers:
    """Bytes per parameter: what releasing gradients frees and an update takes back; the device's peak beyond live
    memory while a checkpoint is saved and loaded; what the host holds more than before."""
    from megatron_aspo.policy import checkpoint

    train = replace(tools.run_config(lab).train, release_gradients=True)
    config, memory = tools.run_config(lab, train=train), tools.Memory(lab)
    with tools.open_policy(lab, config) as policy:
        batches = policy.pack(tools.make_samples(lab, config, 4))
        count = sum(parameter.numel() for parameter in policy.model.parameters())
        tools.set_old_logprobs(policy, batches)
        tools.take_update(policy, batches)
        held = memory.live
        policy.release_gradients()
        released = held - memory.live
        tools.take_update(policy, batches)
        restored = memory.live - (held - released)
        policy.release_gradients()
        host, before = _host_peak(), memory.reset()
        path = checkpoint.save(lab.path / "memory", 1, policy, {}, keep=1)
        save, before = memory.peak - before, memory.reset()
        checkpoint.load(path, policy)
        sizes = {"released": released, "restored": restored, "save": save, "load": memory.peak - before}
        sizes["host"] = max(0, _host_peak() - host - (1 << 28))  # libraries that a save imports
    return {name: size / count for name, size in sizes.items()}


def _host_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
