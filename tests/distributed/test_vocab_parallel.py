"""Log-probs over a vocabulary that is sharded across real gloo ranks."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from ranks import run, run_config
from torch import Tensor
from watch import Watch

from megatron_aspo.config.loss import ObjectiveName, PolicyLossConfig
from megatron_aspo.loss import policy_loss, vocab_parallel_logprobs
from megatron_aspo.ranks.process_group import distributed
from tests.unit.scalar_losses import response_terms

pytestmark = pytest.mark.distributed

V = 48
OBJECTIVES = get_args(ObjectiveName)


def tensor_group(size: int) -> dist.ProcessGroup:
    """This rank's group in a world of four. Groups of two are ranks 0, 2 and 1, 3, so that group rank and global
    rank differ."""
    groups = [dist.new_group(list(range(first, 4, 4 // size))) for first in range(4 // size)]
    group = groups[dist.get_rank() % (4 // size)]
    assert isinstance(group, dist.ProcessGroup)
    return group


def shard(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    return whole.chunk(group.size(), -1)[group.rank()].clone()


def plain_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits / temperature, -1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], entropy


def random_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, V, generator=generator, dtype=torch.float64) * 4
    logits[..., -V // 4 :] = -torch.inf  # padded vocabulary: the last of four shards is all padding
    targets = torch.randint(V - V // 4, (3, 7), generator=generator)
    return logits.to(dtype), targets


def compare_with_plain(size: int, dtype: torch.dtype, tolerance: float) -> None:
    with distributed(run_config()):
        group = tensor_group(size)
        whole, targets = random_batch(dtype)
        weights = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        logits, exact = shard(whole, group).requires_grad_(), whole.double().requires_grad_()
        found = vocab_parallel_logprobs(logits, targets, group, temperature=0.7)
        expected = plain_logprobs(exact, targets, 0.7)
        for values in (found, expected):
            (weights * torch.stack(values)).sum().backward()
        assert exact.grad is not None
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)
        finest = max(tolerance, torch.finfo(dtype).eps)  # a gradient has the type of its logits
        torch.testing.assert_close(
            logits.grad, shard(exact.grad, group), rtol=finest, atol=tolerance, check_dtype=False
        )


def watch(size: int) -> tuple[Watch, Watch, int]:
    with distributed(run_config()):
        group = tensor_group(size)
        logits = torch.randn(40, 1000 // size, generator=torch.Generator().manual_seed(0)).requires_grad_()
        targets = torch.arange(40)
        with Watch() as forward:
            logprobs, entropy = vocab_parallel_logprobs(logits, targets, group)
        with Watch() as backward:
            (logprobs + entropy).sum().backward()
        return forward, backward, logits.numel()


def derivatives(size: int) -> list[tuple[str, float, float]]:
    """(objective, derivative along a random direction of logits, central differences of the surrogate along it). The
    surrogate is the sum of -w A log pi, with w by plain Python and frozen."""
    found: list[tuple[str, float, float]] = []
    with distributed(run_config()):
        group = tensor_group(size)
        whole, targets = random_batch()
        whole, targets = whole.flatten(0, 1), targets.flatten()
        ids = torch.arange(21) // 7
        generator = torch.Generator().manual_seed(2)
        direction = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(2, 21, generator=generator, dtype=torch.float64)
        advantages = torch.tensor([1.5, -1.0, 0.5], dtype=torch.float64)[ids] + 0.1 * noise[1]
        mask = torch.arange(21) % 7 != 3
        now = plain_logprobs(whole, targets)[0]
        old, reference = now - noise[0], now + noise[1]

        for objective in OBJECTIVES:
            bound = {"dppo": 0.01, "dppo_kl": 1e-4}.get(objective, 0.2)  # probabilities are small here
            config = PolicyLossConfig(objective, bound, bound, 3.0, kl_coef=0.1, entropy_coef=0.05)
            logits = shard(whole, group).requires_grad_()
            logprobs, entropy = vocab_parallel_logprobs(logits, targets, group)
            inputs: dict[str, Any] = {"entropy": entropy, "ref_logprobs": reference, "sequence_ids": ids}
            policy_loss(logprobs, old, advantages, mask, config, **inputs).loss_sum.backward()
            assert logits.grad is not None
            derivative = torch.where(logits.grad == 0, 0.0, logits.grad * shard(direction, group)).sum()
            dist.all_reduce(derivative, group=group)

            weights = torch.zeros_like(now)
            for own in (mask & (ids == i) for i in range(3)):
                response = list(zip(now[own].tolist(), old[own].tolist(), advantages[own].tolist(), strict=True))
                terms = response_terms(config, response)
                weights[own] = torch.tensor([weight for weight, _ in terms], dtype=torch.float64)

            def surrogate(step: float, weights: Tensor) -> Tensor:
                logprobs, entropy = plain_logprobs(whole + step * direction, targets)
                d = logprobs - reference
                loss = -weights * advantages * logprobs + 0.1 * ((-d).exp() - 1 + d) - 0.05 * entropy
                return loss[mask].sum()

            difference = (surrogate(1e-5, weights) - surrogate(-1e-5, weights)) / 2e-5
            found.append((objective, float(derivative), float(difference)))
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_values_and_gradients_are_those_of_the_whole_vocabulary(
    size: int, dtype: torch.dtype, tolerance: float
) -> None:
    run(4, compare_with_plain, size, dtype, tolerance)


@pytest.mark.parametrize("size", [2, 4])
def test_the_gradient_of_every_objective_is_that_of_its_surrogate(size: int) -> None:
    for found in run(4, derivatives, size):
        assert [objective for objective, *_ in found] == list(OBJECTIVES)
        for objective, derivative, difference in found:
            assert derivative == pytest.approx(difference, rel=1e-8), objective
        assert len({round(derivative, 6) for _, derivative, _ in found}) == len(OBJECTIVES)


@pytest.mark.parametrize("size", [2, 4])
def test_one_collective_of_16_bytes_a_token_and_no_gathered_vocabulary(size: int) -> None:
    for forward, backward, logits in run(4, watch, size):
        assert [sent for _, sent in forward.collectives] == [16 * 40]
        assert backward.collectives == []
        assert forward.largest == backward.largest == logits
