"""Top-k and top-p over a vocabulary that is split across real gloo ranks."""

from typing import Any

import pytest
import torch
from ranks import run, run_config
from test_vocab_parallel import shard, tensor_group
from torch import Tensor
from watch import Watch

from megatron_aspo.distributed import distributed
from megatron_aspo.loss import vocab_parallel_logprobs

pytestmark = pytest.mark.distributed

V, PADDED = 50, 64
OPTIONS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": V + 1},
    {"top_p": 0.6},
    {"top_p": 0.05},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": V + 1, "top_p": 0.9},
    {"top_k": 5, "top_p": 1 - 1e-9},
]


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits with ties and impossible tokens. Of four shards of 16 the last has 2 tokens besides padding."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, PADDED, generator=generator, dtype=torch.float64) * 3
    logits[0] = logits[0].round()
    logits[1, :, 16:32] = -torch.inf  # a whole shard of four
    targets = torch.randint(V, (3, 7), generator=generator)
    targets[1] %= 16
    targets[:, ::2] = logits[:, ::2, :V].argmax(-1)
    return logits.to(dtype), targets


def compare_with_whole(size: int, dtype: torch.dtype, vocab_size: int) -> None:
    with distributed(run_config()):
        group = tensor_group(size)
        logits, targets = batch(dtype)
        targets = targets.clamp(max=vocab_size - 1)
        upstream = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1)).unbind()
        close = 1e-12 if dtype == torch.float64 else 1e-5
        for options in OPTIONS:
            whole = logits.clone().requires_grad_()
            expected = vocab_parallel_logprobs(whole, targets, None, vocab_size=vocab_size, temperature=0.8, **options)
            mine = shard(logits, group).requires_grad_()
            found = vocab_parallel_logprobs(mine, targets, group, vocab_size=vocab_size, temperature=0.8, **options)
            for logprobs, entropy in (expected, found):
                assert entropy is not None
                torch.autograd.backward([logprobs, entropy], [u.to(logprobs.dtype) for u in upstream])
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=close, atol=close)
            assert whole.grad is not None
            finest = max(close, torch.finfo(dtype).eps)
            torch.testing.assert_close(mine.grad, shard(whole.grad, group), rtol=finest, atol=close)


def collectives(size: int) -> list[list[int]]:
    """Bytes that this rank puts into each collective: without truncation, with top-k, with top-p, with both."""
    sent: list[list[int]] = []
    with distributed(run_config()):
        group = tensor_group(size)
        choices: list[dict[str, Any]] = [{}, {"top_k": 9}, {"top_p": 0.9}, {"top_k": 9, "top_p": 0.9}]
        for options in choices:
            logits = torch.randn(40, 1000 // size, generator=torch.Generator().manual_seed(0)).requires_grad_()
            with Watch() as watch:
                logprobs, _ = vocab_parallel_logprobs(logits, torch.arange(40), group, **options)
                logprobs.clamp(min=-50).sum().backward()
            sent.append([count for _, count in watch.collectives])
    return sent


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("vocab_size", [V, 30, PADDED])  # 30: two of four shards are nothing but padding
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_truncated_distribution_is_that_of_the_whole_vocabulary(
    dtype: torch.dtype, vocab_size: int, size: int
) -> None:
    run(4, compare_with_whole, size, dtype, vocab_size)


@pytest.mark.parametrize("size", [2, 4])
def test_top_k_takes_4_further_collectives_and_top_p_5(size: int) -> None:
    logprobs, select = [16 * 40], [256 * 8 * 40] * 4
    for sent in run(4, collectives, size):
        assert sent == [
            logprobs,
            select + logprobs,
            logprobs + select + logprobs,
            select + logprobs + select + logprobs,
        ]
