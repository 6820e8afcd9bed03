"""Loading on a GPU, as far as a CPU can test it: offloaded optimizers and Transformer Engine's extra state."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from ranks import open_policy, run, run_config
from torch import Tensor

from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.cpu import cuda as cpu
from megatron_aspo.ranks.process_group import distributed

pytestmark = pytest.mark.distributed

VARIABLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


class OnGpu(torch.nn.Parameter):
    """A CPU parameter that HybridDeviceOptimizer treats as one on a GPU."""

    is_cuda = True  # type: ignore[assignment]


class GroupStepAdam(torch.optim.Optimizer):
    """Adam that counts its updates in its parameter groups, as Transformer Engine's FusedAdam does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), t = group["betas"], group["step"]
            for p in group["params"]:
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(p))
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad**2, 1 - beta2)
                scale = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
                p.data -= group["lr"] * state["exp_avg"] / (1 - beta1**t) / scale


class Distributed:
    """The part of Megatron's DistributedOptimizer that loads into a HybridDeviceOptimizer."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.params = [OnGpu(weight.clone()) for weight in weights]
        self.buffers = [self.params]
        groups = [{"params": self.params, "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}]
        self.optimizer = HybridDeviceOptimizer(
            groups,
            offload_fraction=0.5,
            cpu_optimizer_cls=torch.optim.AdamW,
            gpu_optimizer_cls=GroupStepAdam,
            pin_cpu_grads=False,
            overlap_cpu_optimizer_d2h_h2d=False,
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.optimizer.state:
            self.optimizer.dummy_step()
        inner = self.optimizer.state_dict()
        groups = state["optimizer"]["param_groups"]
        for values in self.optimizer.state.values():
            values["step"] = torch.tensor(float(groups[0]["step"]))
        params = [group["params"] for group in inner["param_groups"]]
        loaded = [group | {"params": indices} for group, indices in zip(groups, params, strict=True)]
        self.optimizer.load_state_dict({"state": inner["state"], "param_groups": loaded})

    def load_parameter_state_from_fully_reshardable(self, moments: list[dict[str, Tensor]]) -> None:
        for param, values in zip(self.params, moments, strict=True):
            self.optimizer.state[param] |= {name: value.clone() for name, value in values.items()}
        self.optimizer._sync_hdo_state_to_sub_optimizers()

    def learn(self, gradients: list[Tensor]) -> list[Tensor]:
        """Weights after each update."""
        history: list[Tensor] = []
        for gradient in gradients:
            for param in self.params:
                param.grad = gradient.clone()
            self.optimizer.step()
            history.append(torch.stack([param.detach().clone() for param in self.params]))
        return history


def resumed_and_unbroken() -> tuple[list[Tensor], list[Tensor]]:
    cpu.enable()
    with distributed(run_config()):
        torch.Tensor.pin_memory = lambda self: self  # type: ignore[method-assign, assignment]
        generator = torch.Generator().manual_seed(0)
        gradients = [torch.randn(8, generator=generator) for _ in range(50)]
        weights = [torch.ones(8), torch.ones(8)]
        unbroken = Distributed(weights).learn(gradients)
        before = Distributed(weights)
        saved = before.learn(gradients[:40])[-1]
        parts = [len(group["params"]) for o in before.optimizer.sub_optimizers for group in o.param_groups]
        assert parts == [1, 1]  # one parameter on each device
        moments = [
            {name: before.optimizer.state[param][name] for name in ("exp_avg", "exp_avg_sq")} for param in before.params
        ]
        resumed = Distributed(list(saved))
        state = {"optimizer": {"param_groups": [{"step": 40}]}, "param_state": moments}
        policy: Any = SimpleNamespace(optimizer=SimpleNamespace(chained_optimizers=[resumed]))
        checkpoint._load_optimizer(policy, state)
        for param, weight in zip(resumed.params, saved, strict=True):
            param.data.copy_(weight)
        for inner, param in resumed.optimizer.inner_param_to_orig_param.items():
            inner.data.copy_(param.data)
        return resumed.learn(gradients[40:]), unbroken[40:]


def test_a_half_offloaded_optimizer_goes_on_counting_its_updates() -> None:
    ((resumed, unbroken),) = run(1, resumed_and_unbroken)
    for update, (ours, expected) in enumerate(zip(resumed, unbroken, strict=True)):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7, msg=lambda m, n=update: f"update {n}: {m}")


def seen_by_the_module(root: Path) -> list[str | None]:
    """Value of the variable during each load."""
    config = run_config()
    seen: list[str | None] = []
    with open_policy(config) as policy:
        checkpoint.save(root, 1, policy, {})
        policy.model.module.register_load_state_dict_pre_hook(lambda *_: seen.append(os.environ.pop(VARIABLE, None)))
        checkpoint.load(root / "step_000001", policy)
        checkpoint.load_weights(root / "step_000001", policy)
        return seen


def test_delayed_fp8_scales_may_be_unpickled_during_a_load(tmp_path: Path) -> None:
    assert run(1, seen_by_the_module, tmp_path) == [["1", "1"]]
