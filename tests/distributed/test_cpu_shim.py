"""What stands in for CUDA on a host without one: does nothing where CUDA is, and computes the right thing where not."""

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

from megatron_aspo.distributed import distributed
from megatron_aspo.packing import stream_part
from megatron_aspo.policy import cpu

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
    assert not any(patched)  # so the comparison does see what is patched


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[s, h, d] of one sequence whose last query stands at its last key; query heads share key heads in order."""
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
    ours = cpu.PackedAttention(CONFIG)(q, k, v, None, packed_seq_params=stream)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    expected = torch.cat([naive_attention(*part) for part in parts]).flatten(1)
    assert_same_with_gradients(ours, expected, inputs)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (3, 7)])
def test_attention_over_a_batch_with_a_key_value_cache(queries: int, keys: int) -> None:
    q, k, v = inputs = random_tensors((queries, 2, 4, 6), (keys, 2, 2, 6), (keys, 2, 2, 6))
    ours = cpu.PackedAttention(CONFIG)(q, k, v, None)
    rows = [naive_attention(q[:, b], k[:, b], v[:, b]) for b in range(2)]
    assert_same_with_gradients(ours, torch.stack(rows, 1).flatten(2), inputs)


def test_the_norm_is_the_root_mean_square_and_says_that_its_weight_is_shared() -> None:
    norm = cpu.RMSNorm(CONFIG, 6, eps=1e-3)
    (x,) = random_tensors((4, 6))
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    assert_same_with_gradients(norm(x), expected, [x, norm.weight])
    assert getattr(norm.weight, "sequence_parallel") is True  # noqa: B009


def rotate(boundaries: list[int], interleaved: bool) -> tuple[Tensor, Tensor]:
    """This rank's part of a packed stream rotated by Megatron's own loop over segments, and by ours."""
    import megatron.core.models.common.embeddings.rope_utils as rope

    megatrons = rope._apply_rotary_pos_emb_thd
    with distributed(run_config()):
        group: Any = torch.distributed.group.WORLD
        (t, angles) = random_tensors((boundaries[-1] // group.size(), 3, 6), (12, 1, 1, 6))
        arguments = (t, torch.tensor(boundaries, dtype=torch.int32), angles)
        options = {"rotary_interleaved": interleaved, "cp_group": group}
        assert rope._apply_rotary_pos_emb_thd is not megatrons
        return megatrons(*arguments, **options).detach(), rope._apply_rotary_pos_emb_thd(*arguments, **options).detach()


@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_streams_are_rotated_as_megatron_does(interleaved: bool) -> None:
    ((expected, ours),) = run(1, rotate, [0, 1, 8, 20], interleaved)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours[:1].repeat(20, 1, 1), ours)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("boundaries", [[0, 12], [0, 12, 24, 36], [0, 12, 12, 24]])
def test_parts_of_packed_streams_are_rotated_as_megatron_does(ranks: int, boundaries: list[int]) -> None:
    parts = run(ranks, rotate, boundaries, False)
    for expected, ours in parts:
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(parts[0][1], parts[1][1])


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
    """(this rank's places, output there, [(gradients from ours, from the whole stream)])."""
    with distributed(run_config()):
        group: Any = torch.distributed.group.WORLD
        lengths = [b - a for a, b in itertools.pairwise(boundaries)]
        stream = SimpleNamespace(cu_seqlens_q=torch.tensor(boundaries, dtype=torch.int32), max_seqlen_q=max(lengths))
        whole = random_tensors((boundaries[-1], 4, 6), (boundaries[-1], 2, 6), (boundaries[-1], 2, 6))
        upstream = torch.linspace(-1, 1, boundaries[-1] * 24, dtype=torch.float64).view(-1, 24)
        expected = torch.autograd.grad(
            cpu.PackedAttention(CONFIG)(*whole, None, packed_seq_params=stream), whole, upstream
        )

        mine = stream_part(stream.cu_seqlens_q, group.rank(), group.size())
        parts = [x.detach()[mine].requires_grad_() for x in whole]
        config = SimpleNamespace(**{**vars(CONFIG), "context_parallel_size": group.size()})
        attention = cpu.PackedAttention(config, pg_collection=SimpleNamespace(cp=group))
        out = attention(*parts, None, packed_seq_params=stream)
        ours = torch.autograd.grad(out, parts, upstream[mine])
        return mine, out.detach(), [(a, b[mine]) for a, b in zip(ours, expected, strict=True)]


@pytest.mark.parametrize("boundaries", [[0, 24], [0, 12, 36], [0, 12, 12, 48]])
@pytest.mark.parametrize("ranks", [2, 3])
def test_attention_of_parts_is_attention_of_the_stream(ranks: int, boundaries: list[int]) -> None:
    q, k, v = random_tensors((boundaries[-1], 4, 6), (boundaries[-1], 2, 6), (boundaries[-1], 2, 6))
    lengths = [b - a for a, b in itertools.pairwise(boundaries)]
    segments = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    expected = torch.cat([naive_attention(*part) for part in segments]).flatten(1).detach()
    for mine, out, gradients in run(ranks, attend_to_a_part, boundaries):
        torch.testing.assert_close(out, expected[mine], rtol=1e-10, atol=1e-10)
        for ours, of_the_whole in gradients:
            torch.testing.assert_close(ours, of_the_whole, rtol=1e-10, atol=1e-10)
