"""The rehearsal's kernels of gated delta nets against the functions of the CPU, and what they keep and cost by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_aspo.policy.cpu import gated_delta
from megatron_aspo.tools.rehearsal.engine import delta_net, registry

T, HEADS, KEY, VALUE = 100, 4, 8, 16
CHUNKS = 3  # of 64 tokens: two for the segment of 70, one for that of 30
SEGMENTS = torch.tensor([0, 70, 100])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    """Kind, operations and bytes of each kernel."""
    noted: list[tuple[str, float, int]] = []

    class Tape:
        def kernel(self, *cost: Any) -> None:
            noted.append(cost)

    monkeypatch.setattr(registry.state, "tape_now", Tape)
    return noted


def results(function: Callable[..., Any], inputs: list[Tensor], **options: Any) -> tuple[list[Tensor], int]:
    """The output and the inputs' gradients; bytes that are kept for the backward pass."""
    leaves, kept = [x.clone().requires_grad_() for x in inputs], dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(*leaves, **options)
    out = out[0] if isinstance(out, tuple) else out
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))], sum(kept.values())


def check_like_on_a_cpu(name: str, inputs: list[Tensor], **options: Any) -> int:
    """Check shapes and types against the function that computes; return the bytes kept."""
    expected, _ = results(getattr(gated_delta, name), inputs, **options)
    found, kept = results(getattr(delta_net, name), inputs, **options)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    return kept


def test_l2norm(kernels: list[Any]) -> None:
    x = torch.randn(1, T, 2 * HEADS, KEY).bfloat16()
    kept = check_like_on_a_cpu("l2norm", [x])
    assert kept == x.nbytes + 4 * T * 2 * HEADS  # the result and its norms in float32
    assert kernels == [("elementwise", 0.0, 2 * x.nbytes), ("elementwise", 0.0, 3 * x.nbytes)]


def test_causal_conv1d(kernels: list[Any]) -> None:
    x, weight = torch.randn(1, T, 24).bfloat16(), torch.randn(24, 4).bfloat16()
    options = {"bias": None, "activation": "silu", "cu_seqlens": SEGMENTS}
    assert check_like_on_a_cpu("causal_conv1d", [x, weight], **options) == x.nbytes + weight.nbytes
    parts = CHUNKS * weight.numel() * 4
    assert [moved for _, _, moved in kernels] == [2 * x.nbytes, 2 * x.nbytes, 4 * x.nbytes + parts]


def test_chunk_gated_delta_rule(kernels: list[Any]) -> None:
    q, k = (torch.randn(1, T, HEADS, KEY).bfloat16() for _ in range(2))
    v, g = torch.randn(1, T, HEADS, VALUE).bfloat16(), -torch.rand(1, T, HEADS)
    beta = torch.rand(1, T, HEADS).bfloat16()
    kept = check_like_on_a_cpu("chunk_gated_delta_rule", [q, k, v, g, beta], cu_seqlens=SEGMENTS)
    triangles = T * HEADS * 64 * 2  # a row of [64, 64] for each token and head
    assert kept == q.nbytes + k.nbytes + v.nbytes + g.nbytes + beta.nbytes + triangles
    (kind, forward, moved), (_, _, again), (_, backward, _), _ = kernels
    assert kind == "attention"
    assert forward == 2 * T * HEADS * (3 * KEY * VALUE + 64 * (3 * KEY + 2 * VALUE))
    assert backward == 2 * T * HEADS * (8 * KEY * VALUE + 64 * (8 * KEY + 5 * VALUE))
    states = CHUNKS * HEADS * KEY * VALUE * 2
    work = 2 * triangles + k.nbytes + 2 * v.nbytes + states  # triangles in float32 first
    assert moved == kept + g.nbytes + work
    assert again == work + v.nbytes
