"""The CPU shim for CUDA: it changes nothing if CUDA is available, and its layers are exact otherwise."""

from __future__ import annotations

import importlib
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run, run_config
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from megatron_aspo.policy.cpu import cuda as cpu
from megatron_aspo.policy.cpu import layers
from megatron_aspo.policy.packing import stream_part
from megatron_aspo.policy.rotary import apply_rotary_thd
from megatron_aspo.ranks.process_group import distributed

pytestmark = pytest.mark.distributed

CONFIG = SimpleNamespace(
    context_parallel_size=1, attention_dropout=0.0, params_dtype=torch.float64, sequence_parallel=True
)


def patched_things() -> list[Any]:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer
    import megatron.core.models.common.embeddings.rope_utils as rope
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as rng
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    modules = [torch.cuda, writer, rope, rng, mappings, dispatcher]
    return [
        [vars(module).copy() for module in modules],
        torch.Tensor.cuda,
        _get_current_function_mode_stack(),
        torch.zeros(1).type(),
    ]


def enable_with_and_without_cuda() -> tuple[bool, bool, list[bool], bool, list[bool]]:
    before = patched_things()
    without_cuda = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    importlib.reload(cpu)
    used = cpu.enable()
    torch.cuda.is_available = without_cuda
    idle = [a == b for a, b in zip(patched_things(), before, strict=True)]
    used_without = cpu.enable()
    return used, used_without, idle, cpu.enable(), [a == b for a, b in zip(patched_things(), before, strict=True)]


def test_nothing_is_patched_where_cuda_is_available() -> None:
    used, used_without, idle, again, patched = run(1, enable_with_and_without_cuda)[0]
    assert used is False
    assert all(idle)
    assert used_without is again is True
    assert not any(patched)  # the comparison therefore does see the patched attributes


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [s, h, d] of one sequence whose last query is at its last key; query heads share key heads in order."""
    out = torch.zeros_like(q)
    for i in range(q.shape[0]):
        seen = k.shape[0] - q.shape[0] + i + 1
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            p = torch.softmax(k[:seen, shared] @ q[i, head] / q.shape[-1] ** 0.5, -1)
            out[i, head] = p @ v[:seen, shared]
    return out


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_same_with_gradients(ours: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view(ours.shape)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("boundaries", [[0, 9], [0, 1, 6, 9], [0, 4, 4, 9], [0, 3, 6, 9]])
def test_packed_attention_is_attention_within_each_segment(boundaries: list[int]) -> None:
    q, k, v = inputs = random_tensors((9, 4, 6), (9, 2, 6), (9, 2, 6))
    lengths = [b - a for a, b in itertools.pairwise(boundaries)]
    stream = SimpleNamespace(cu_seqlens_q=torch.tensor(boundaries, dtype=torch.int32), max_seqlen_q=max(lengths))
    ours = layers.PackedAttention(CONFIG)(q, k, v, None, packed_seq_params=stream)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    expected = torch.cat([naive_attention(*part) for part in parts]).flatten(1)
    assert_same_with_gradients(ours, expected, inputs)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (3, 7)])
def test_attention_over_a_batch_with_a_key_value_cache(queries: int, keys: int) -> None:
    q, k, v = inputs = random_tensors((queries, 2, 4, 6), (keys, 2, 2, 6), (keys, 2, 2, 6))
    ours = layers.PackedAttention(CONFIG)(q, k, v, None)
    rows = [naive_attention(q[:, b], k[:, b], v[:, b]) for b in range(2)]
    assert_same_with_gradients(ours, torch.stack(rows, 1).flatten(2), inputs)


@pytest.mark.parametrize("around_zero", [False, True])
def test_the_norm_is_the_root_mean_square_and_says_that_its_weight_is_shared(around_zero: bool) -> None:
    config = SimpleNamespace(**vars(CONFIG), layernorm_zero_centered_gamma=around_zero)
    norm = layers.RMSNorm(config, 6, eps=1e-3)
    (x,) = random_tensors((4, 6))
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (norm.weight + around_zero)
    assert_same_with_gradients(norm(x), expected, [x, norm.weight])
    assert getattr(norm.weight, "sequence_parallel") is True  # noqa: B009


def rotate(boundaries: list[int], interleaved: bool) -> tuple[Tensor, Tensor]:
    """This rank's shard of a packed stream, rotated by Megatron's own loop over segments and by the shim."""
    import megatron.core.models.common.embeddings.rope_utils as rope

    with distributed(run_config()):
        group: Any = torch.distributed.group.WORLD
        (t, angles) = random_tensors((boundaries[-1] // group.size(), 3, 6), (12, 1, 1, 6))
        arguments = (t, torch.tensor(boundaries, dtype=torch.int32), angles)
        options = {"rotary_interleaved": interleaved, "mla_rotary_interleaved": False, "mscale": 1.0, "cp_group": group}
        megatrons = rope._apply_rotary_pos_emb_thd(*arguments, **options)
        ours = apply_rotary_thd(*arguments, **options)
        torch.distributed.barrier()  # rank 0 holds the store by which the others may still be connecting
        return megatrons.detach(), ours.detach()


@pytest.mark.parametrize(
    ("ranks", "boundaries", "interleaved"),
    [(1, [0, 1, 8, 20], False), (1, [0, 1, 8, 20], True)]
    + [(ranks, bounds, False) for ranks in (2, 3) for bounds in ([0, 12], [0, 12, 24, 36], [0, 12, 12, 24])],
)
def test_packed_streams_are_rotated_as_megatron_does(ranks: int, boundaries: list[int], interleaved: bool) -> None:
    parts = run(ranks, rotate, boundaries, interleaved)
    for expected, ours in parts:
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(ours[:1].expand_as(ours), ours)
    assert ranks == 1 or not torch.allclose(parts[0][1], parts[1][1])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parts_of_streams_are_those_of_megatron(ranks: int) -> None:
    import megatron.core.transformer.experimental_attention_variant.dsa_layout as layout

    boundaries = torch.tensor([0, 24, 72, 72, 144], dtype=torch.int32)
    for rank in range(ranks):
        megatrons = layout.build_packed_allgather_cp_local_positions(boundaries, ranks, rank, boundaries.device)
        ours = stream_part(boundaries, rank, ranks)
        assert ours.dtype == megatrons.dtype
        assert ours.tolist() == megatrons.tolist()


def attend_to_a_part(boundaries: list[int]) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """(this rank's positions, output there, [(gradients from the shim, from the whole stream)])."""
    cpu.enable()
    with distributed(run_config()):
        group: Any = torch.distributed.group.WORLD
        lengths = [b - a for a, b in itertools.pairwise(boundaries)]
        stream = SimpleNamespace(cu_seqlens_q=torch.tensor(boundaries, dtype=torch.int32), max_seqlen_q=max(lengths))
        whole = random_tensors((boundaries[-1], 4, 6), (boundaries[-1], 2, 6), (boundaries[-1], 2, 6))
        upstream = torch.linspace(-1, 1, boundaries[-1] * 24, dtype=torch.float64).view(-1, 24)
        expected = torch.autograd.grad(
            layers.PackedAttention(CONFIG)(*whole, None, packed_seq_params=stream), whole, upstream
        )

        local = stream_part(stream.cu_seqlens_q, group.rank(), group.size())
        parts = [x.detach()[local].requires_grad_() for x in whole]
        config = SimpleNamespace(**{**vars(CONFIG), "context_parallel_size": group.size()})
        attention = layers.PackedAttention(config, pg_collection=SimpleNamespace(cp=group))
        out = attention(*parts, None, packed_seq_params=stream)
        ours = torch.autograd.grad(out, parts, upstream[local])
        return local, out.detach(), [(a, b[local]) for a, b in zip(ours, expected, strict=True)]


@pytest.mark.parametrize("boundaries", [[0, 24], [0, 12, 36], [0, 12, 12, 48]])
@pytest.mark.parametrize("ranks", [2, 3])
def test_attention_of_parts_is_attention_of_the_stream(ranks: int, boundaries: list[int]) -> None:
    q, k, v = random_tensors((boundaries[-1], 4, 6), (boundaries[-1], 2, 6), (boundaries[-1], 2, 6))
    lengths = [b - a for a, b in itertools.pairwise(boundaries)]
    segments = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    expected = torch.cat([naive_attention(*part) for part in segments]).flatten(1).detach()
    for local, out, gradients in run(ranks, attend_to_a_part, boundaries):
        torch.testing.assert_close(out, expected[local], rtol=1e-10, atol=1e-10)
        for ours, of_the_whole in gradients:
            torch.testing.assert_close(ours, of_the_whole, rtol=1e-10, atol=1e-10)
