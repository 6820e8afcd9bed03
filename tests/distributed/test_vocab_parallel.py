"""Log-probs over a vocabulary that is split across real gloo ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from ranks import run, run_config
from torch import Tensor
from watch import Watch

from megatron_aspo.config import PolicyLossConfig
from megatron_aspo.distributed import distributed
from megatron_aspo.loss import policy_loss, vocab_parallel_logprobs

pytestmark = pytest.mark.distributed

V = 48


def tensor_group(size: int) -> dist.ProcessGroup:
    """This rank's group in a world of four; groups of two are ranks 0, 2 and 1, 3: group rank is not global rank."""
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
    logits[..., -V // 4 :] = -torch.inf  # padded vocabulary: the last of four shards has nothing else
    targets = torch.randint(V - V // 4, (3, 7), generator=generator)
    return logits.to(dtype), targets


def compare_with_plain(size: int, dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    with distributed(run_config()):
        group = tensor_group(size)
        whole, targets = random_batch(dtype)
        weights = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

        expected_logits = whole.to(torch.float64, copy=True).requires_grad_()
        expected = plain_logprobs(expected_logits, targets, temperature)
        (weights[0] * expected[0] + weights[1] * expected[1]).sum().backward()
        assert expected_logits.grad is not None

        logits = shard(whole, group).requires_grad_()
        logprobs, entropy = vocab_parallel_logprobs(logits, targets, group, temperature=temperature)
        assert entropy is not None
        (weights[0] * logprobs + weights[1] * entropy).sum().backward()
        close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
        torch.testing.assert_close(logprobs, expected[0], **close)
        torch.testing.assert_close(entropy, expected[1], **close)
        # A gradient cannot be finer than the type of the logits it belongs to.
        finest = max(tolerance, torch.finfo(dtype).eps)
        torch.testing.assert_close(
            logits.grad, shard(expected_logits.grad, group), rtol=finest, atol=tolerance, check_dtype=False
        )


def watch(size: int) -> tuple[Watch, Watch, int]:
    with distributed(run_config()):
        group = tensor_group(size)
        logits = torch.randn(40, 1000 // size, generator=torch.Generator().manual_seed(0)).requires_grad_()
        targets = torch.arange(40)
        with Watch() as forward:
            logprobs, entropy = vocab_parallel_logprobs(logits, targets, group)
        assert entropy is not None
        with Watch() as backward:
            (logprobs + entropy).sum().backward()
        return forward, backward, logits.numel()


def _kept(r: float, a: float) -> bool:
    return r <= 1.2 if a > 0 else r >= 0.8


def _sapo(r: float, tau: float) -> float:
    gate = 1 / (1 + math.exp(-tau * (r - 1)))
    return r * 4 * gate * (1 - gate)


# The table of docs: w(r, A) with the response's mean ratio m and its geometric mean g; clips 0.2, c = 3.
WEIGHTS = {
    "aspo": lambda r, a, m, g: min(1 / r if a > 0 else r, 3) * _kept(r, a),
    "grpo": lambda r, a, m, g: r * _kept(r, a) * (a > 0 or r <= 3),
    "no_is": lambda r, a, m, g: _kept(r, a),
    "response_mean_is": lambda r, a, m, g: (m if a > 0 else r) * _kept(r, a) * (a > 0 or r <= 3),
    "cispo": lambda r, a, m, g: min(max(r, 0.8), 1.2),
    "gspo": lambda r, a, m, g: g * _kept(g, a),
    "sapo": lambda r, a, m, g: _sapo(r, 1.0 if a > 0 else 1.05),
}


def derivatives(size: int) -> list[tuple[str, float, float]]:
    """(objective, derivative along a random direction of logits, the same by central differences of the surrogate
    sum of -w A log pi, with w from the table and frozen)."""
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
        ratio = (now - old).exp()

        for objective, weight_of in WEIGHTS.items():
            config = PolicyLossConfig(objective=objective, kl_coef=0.1, entropy_coef=0.05)  # type: ignore[arg-type]
            logits = shard(whole, group).requires_grad_()
            logprobs, entropy = vocab_parallel_logprobs(logits, targets, group)
            inputs = {"entropy": entropy, "ref_logprobs": reference, "sequence_ids": ids}
            policy_loss(logprobs, old, advantages, mask, config, **inputs).loss_sum.backward()
            assert logits.grad is not None
            derivative = torch.where(logits.grad == 0, 0.0, logits.grad * shard(direction, group)).sum()
            dist.all_reduce(derivative, group=group)

            weights = []
            for r, a, i in zip(ratio.tolist(), advantages.tolist(), ids.tolist(), strict=True):
                own = ratio[mask & (ids == i)]
                weights.append(float(weight_of(r, a, float(own.mean()), float(own.log().mean().exp()))))

            def surrogate(step: float, weights: Tensor) -> Tensor:
                logprobs, entropy = plain_logprobs(whole + step * direction, targets)
                d = logprobs - reference
                loss = -weights * advantages * logprobs + 0.1 * ((-d).exp() - 1 + d) - 0.05 * entropy
                return loss[mask].sum()

            frozen = torch.tensor(weights, dtype=torch.float64)
            difference = (surrogate(1e-5, frozen) - surrogate(-1e-5, frozen)) / 2e-5
            found.append((objective, float(derivative), float(difference)))
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_values_and_gradients_are_those_of_the_whole_vocabulary(
    size: int, dtype: torch.dtype, tolerance: float
) -> None:
    run(4, compare_with_plain, size, dtype, tolerance, 0.7)


@pytest.mark.parametrize("size", [2, 4])
def test_the_gradient_of_every_objective_is_that_of_its_surrogate(size: int) -> None:
    for found in run(4, derivatives, size):
        assert [objective for objective, *_ in found] == list(WEIGHTS)
        for objective, derivative, difference in found:
            assert derivative == pytest.approx(difference, rel=1e-8), objective
        assert len({round(derivative, 6) for _, derivative, _ in found}) == len(WEIGHTS)


@pytest.mark.parametrize("size", [2, 4])
def test_one_collective_of_16_bytes_a_token_and_no_gathered_vocabulary(size: int) -> None:
    for forward, backward, logits in run(4, watch, size):
        assert [sent for _, sent in forward.collectives] == [16 * 40]
        assert backward.collectives == []
        assert forward.largest == backward.largest == logits
