"""Checks 2 to 4: the loss's matrix products, Triton kernels and fused head; and the head's time and memory."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_aspo.loss import (
    PolicyLossConfig,
    fused_linear_policy_loss,
    policy_loss,
    softmax,
    vocab_parallel_logprobs,
)
from megatron_aspo.loss.fused_gradients import add_product
from megatron_aspo.loss.objectives import OBJECTIVES
from megatron_aspo.loss.output_layer import OutputLayer
from megatron_aspo.tools.gpu_check.lab import Memory
from megatron_aspo.tools.gpu_check.records import ANY, Bounds, Lab, Numbers, check, keep_largest


def _error(values: Tensor, exact: Tensor) -> float:
    return float((values.double() - exact).abs().max() / exact.abs().max())


def _inputs(lab: Lab, tokens: int, hidden: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output weight and targets."""
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, device=lab.device).bfloat16()
    weight = (torch.randn(vocabulary, hidden, device=lab.device) * hidden**-0.5).bfloat16()
    return states, weight, torch.randint(0, vocabulary - 1, (tokens,), device=lab.device)


@check("2 GEMMs", 10, {"error / eps": (0, 200), "sum's error / eps": (0, 200), "empty": (0, 0)}, bare=True, on_cpu=True)
def gemms(lab: Lab) -> Numbers:
    """The products of the head, of slices, transposed and summed in float32, against float64; eps is the result's, so
    that 16-bit sums on a GPU fail."""
    n, h, v = (32, 64, 47) if lab.small else (1024, 5120, 19007)
    states, weight, targets = _inputs(lab, 4 * n, h, v + 1)
    positions = torch.arange(4 * n, device=lab.device)
    total = torch.zeros(v + 1, h, device=lab.device)
    exact = total.double()
    found: Numbers = {}
    eps, grad = 1.0, states[:, :0]
    for chunk, logits in OutputLayer(weight, None, False, n, 1.0, v).sweep(states, targets, positions).logits():
        grad, eps = logits.bfloat16(), torch.finfo(logits.dtype).eps
        error = _error(logits, states[chunk].double() @ weight[:v].double().t())
        keep_largest(found, {"error / eps": error / eps})
        add_product(total[:v], grad.t(), states[chunk])
        exact[:v] += grad.double().t() @ states[chunk].double()
    before = total.clone()
    add_product(total[:v], grad[:0].t(), states[:0])
    add_product(total[:0], grad[:, :0].t(), states[:n])
    empty = float((total != before).sum())
    return found | {"sum's error / eps": _error(total, exact) / eps, "empty": empty}


@check("3 Triton", 15, {"error": (0, 1e-5), "differs in a second run": (0, 0)}, bare=True, on_cpu=True)
def triton_kernels(lab: Lab) -> Numbers:
    """Statistics and gradient of both kernels against the torch path: odd columns in longer rows, absent targets."""
    rows, columns = (5, 129) if lab.small else (512, 19007)
    found: Numbers = {}
    for dtype, temperature, with_entropy in itertools.product((torch.bfloat16, torch.float32), (1.0, 0.7), (0, 1)):
        torch.manual_seed(1)
        logits = (4 * torch.randn(rows, columns + 3, device=lab.device)).to(dtype)[:, :columns]
        targets = torch.randint(-1, columns, (rows,), device=lab.device)
        slopes = torch.randn(2, rows, device=lab.device)
        results: list[list[Tensor]] = []
        for choice in ("torch", "triton", "triton"):
            os.environ[softmax.KERNELS_VARIABLE] = choice
            stats = softmax.statistics(logits, targets, temperature)
            log_normalizer, entropy, _ = softmax.merge(stats[None])
            rest = (slopes[0], slopes[1] if with_entropy else None, torch.empty_like(logits, dtype=torch.float32))
            results.append([stats, softmax.gradient(logits, targets, log_normalizer, entropy, *rest, temperature)])
        for reference, first, second in zip(*results, strict=True):
            differing = float((first != second).sum())
            keep_largest(found, {"error": _error(first, reference.double()), "differs in a second run": differing})
    return found


LOSSES = [*map(PolicyLossConfig, OBJECTIVES), PolicyLossConfig(anchor="rollout", anchor_band=(0.3, 2.1))]
"""Losses of check 4: every objective, and the ratio to the sampler with two of eight ratios outside its band."""

_FUSED: Bounds = {"losses": (len(LOSSES), 99), "loss": (0, 5e-3), "logprobs": (0, 0.02), "hidden": (0, 1e-2)}
_FUSED |= {"weight": (0, 1e-2), "peak / planned": (0, 1.1)}


@check("4 fused loss", 15, _FUSED, bare=True, on_cpu=True)
def fused_loss(lab: Lab) -> Numbers:
    """Each of `LOSSES` on bfloat16 inputs, with masked tokens and `main_grad`, against float64 logits.

    Log ratios are at a distance from all clips and equal within a response, so that rounding crosses no clip. After
    the first call a wait for the GPU is an error.
    """
    n, h, v, chunk = (48, 32, 67, 16) if lab.small else (4096, 1024, 32003, 1024)
    states, weight, targets = _inputs(lab, n, h, v)
    ids = torch.arange(n, device=lab.device) // (n // 16)
    mask = torch.rand(n, device=lab.device) < 0.8
    log_ratios = torch.tensor([-1.6, -0.7, -0.35, -0.1, 0.05, 0.12, 0.45, 0.8], device=lab.device).repeat(2)
    exact_states, exact_weight = (x.double().requires_grad_() for x in (states, weight))
    logprobs, entropy = vocab_parallel_logprobs(exact_states @ exact_weight.t(), targets, None)
    tokens: dict[str, Any] = {"old_logprobs": (logprobs.detach() - log_ratios[ids]).float(), "loss_mask": mask}
    tokens |= {"advantages": torch.tensor([1.0, -0.5, 2.0], device=lab.device)[ids % 3], "sequence_ids": ids}
    parameter: Any = torch.nn.Parameter(weight)
    parameter.main_grad = torch.zeros(v, h, device=lab.device)
    inputs, memory = states.clone().requires_grad_(), Memory(lab)
    found: Numbers = {}
    for i, config in enumerate(LOSSES):
        if config.anchor == "rollout":
            tokens |= {"rollout_logprobs": tokens["old_logprobs"], "old_logprobs": None}
        reference = policy_loss(logprobs, config=config, entropy=entropy, **tokens)
        expected = torch.autograd.grad(reference.loss_sum, (exact_states, exact_weight), retain_graph=True)
        parameter.main_grad.zero_()
        inputs.grad, positions = None, mask.nonzero()[:, 0]
        before = memory.reset()
        if lab.device == "cuda" and i:
            torch.cuda.set_sync_debug_mode("error")
        rest = {"config": config, "positions": positions, "chunk_size": chunk}
        out = fused_linear_policy_loss(inputs, parameter, targets, **tokens, **rest)
        out.loss_sum.backward()
        if lab.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        peak = memory.peak - before  # comparisons in float64 follow
        planned = chunk * v * 6 + 2 * inputs.nbytes + 200 * n  # logits in float32, their gradient, states' gradient
        assert inputs.grad is not None
        scale = max(1.0, float(reference.denominator))
        errors = {
            "losses": i + 1,
            "loss": abs(float(out.loss_sum) - float(reference.loss_sum)) / scale,
            "logprobs": float(((out.logprobs - logprobs).abs() * mask).max()),
            "hidden": float((inputs.grad - expected[0]).norm() / expected[0].norm()),
            "weight": float((parameter.main_grad - expected[1]).norm() / expected[1].norm()),
            "peak / planned": peak / planned,
        }
        keep_largest(found, errors)
    return found


HEADS = [(m, h, v) for m in (2048, 8192) for h in (4096, 5120) for v in (131072, 151936)]


@check("head", 45, {"cases": (24, 24), "slowest / floor": ANY, "TFLOP/s": ANY, "peak GB": ANY}, bare=True)
def head(lab: Lab) -> Numbers:
    """Loss and gradients against the time of their three matrix products, by tokens, sizes and chunk."""
    found: Numbers = {"cases": 0.0}
    for m, h, v in [(32, 16, 64)] if lab.small else HEADS:
        states, weight, targets = _inputs(lab, m, h, v)
        parameter: Any = torch.nn.Parameter(weight)
        parameter.main_grad = torch.zeros(v, h, device=lab.device)
        inputs, memory = states.requires_grad_(), Memory(lab)
        for chunk in (8, 16, 24, 32) if lab.small else (c for c in (1024, 2048, 4096, 8192) if c <= m):
            before = memory.reset()
            _fused(inputs, parameter, targets, chunk)
            peak = (memory.peak - before) / 1e9
            seconds = _seconds(lab, partial(_fused, inputs, parameter, targets, chunk))
            grad = states.detach()[:chunk] @ weight.t()  # any values of a gradient's type and shape
            ratio = seconds / _seconds(lab, partial(_floor, inputs, parameter, targets, chunk, grad))
            case = f"{m} x {h} x {v}, {chunk}"
            found |= {f"{case}: ms": 1e3 * seconds, f"{case}: / floor": ratio, f"{case}: GB": peak}
            found["cases"] += 1
            rate = 6 * m * h * v / seconds / 1e12
            keep_largest(found, {"slowest / floor": ratio, "TFLOP/s": rate, "peak GB": peak})
    return found


def _fused(inputs: Tensor, weight: Any, targets: Tensor, chunk: int) -> None:
    ones, positions = torch.ones(len(targets), device=inputs.device), torch.arange(len(targets), device=inputs.device)
    arguments = (inputs, weight, targets, None, ones, ones, PolicyLossConfig())
    fused_linear_policy_loss(*arguments, chunk_size=chunk, positions=positions).loss_sum.backward()
    inputs.grad = None


@torch.no_grad()
def _floor(inputs: Tensor, weight: Any, targets: Tensor, chunk: int, grad: Tensor) -> None:
    positions = torch.arange(len(targets), device=inputs.device)
    layer = OutputLayer(weight, None, False, chunk, 1.0, None)
    for part, logits in layer.sweep(inputs, targets, positions).logits():
        torch.mm(grad[: len(logits)], weight)
        add_product(weight.main_grad, grad[: len(logits)].t(), inputs[part])


def _seconds(lab: Lab, function: Callable[[], None]) -> float:
    """Median of five runs after one."""
    times: list[float] = []
    for _ in range(6):
        start = time.perf_counter()
        function()
        if lab.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
