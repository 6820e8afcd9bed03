"""Independent reference for the fused head: the policy loss of a whole stream over the whole vocabulary, in plain
autograd.

It computes logits, log_softmax and the surrogate: the sum of -w A rho log pi with w and rho frozen, the KL estimate and
the entropy bonus. It uses nothing from the package but the configuration's fields.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aspo.config.loss import PolicyLossConfig
from tests.unit.scalar_losses import response_terms, rollout_factors

VOCAB, PADDED = 70, 96  # makes the last of four shards all padding
HIDDEN = 16
TEMPERATURE = 0.7

# Log ratios at a distance from all clips: 0.6, 0.8, 1.3, 1.4, 3 and 1/3.
_LOG_RATIOS = (-1.6, -0.7, -0.35, -0.1, 0.05, 0.12, 0.45, 0.8, 1.6)
_LOG_CLIPS = tuple(math.log(r) for r in (0.6, 0.8, 1.3, 1.4, 3.0, 1 / 3))
_ROLLOUT_LOG_RATIOS = (-1.0, -0.3, 0.0, 0.02, 0.2, 0.9)


@dataclass(frozen=True)
class Batch:
    """A whole stream [T], or rows [B, T], in order. Masked slots hold valid values.

    Attributes:
        base: [..., T, H], the hidden states. If the weight is tied, half the embeddings are added to them.
        weight: [PADDED, H]; rows from VOCAB on are padding.
        tokens: ids of the embedded tokens.
        part_of: segments that context parallelism splits, each a multiple of 4 long.
        data: targets, loss_mask, advantages, old_logprobs, ref_logprobs, rollout_logprobs, sequence_ids.
    """

    base: Tensor
    weight: Tensor
    tied: bool
    tokens: Tensor
    part_of: Tensor
    data: dict[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """Expected results for a `Batch` and a configuration; the gradients are those of `loss_sum`.

    Attributes:
        size: sum of the tokens' |loss|, the scale for an error of `loss_sum`.
    """

    loss_sum: float
    denominator: float
    size: float
    logprobs: Tensor
    entropy: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


@functools.cache
def make_batch(packed: bool, tied: bool, dtype: torch.dtype) -> Batch:
    """Responses of 0 to 550 tokens after prompts, with ratios in every region of the clips.

    There are enough tokens for several uneven chunks of 257; in packed streams, on each of two context-parallel ranks
    too.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def pick(values: tuple[float, ...], count: int) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (count,), generator=generator)]

    # (length with padding, prompt, response) of every sample
    sizes = [(560, 9, 550), (12, 3, 9), (4, 2, 1), (48, 48, 0), (316, 20, 290), (40, 1, 39), (8, 4, 4), (244, 30, 213)]
    sizes.append((56, 56, 0))  # padding of the stream
    shape: tuple[int, ...] = (sum(size for size, _, _ in sizes),)
    if not packed:
        shape = (12, 80)
        sizes = [(80, i, (0, 1, 66, 80 - i, 58, 67)[i % 6]) for i in range(12)]
    total = sum(size for size, _, _ in sizes)
    lengths = torch.tensor([size for size, _, _ in sizes])
    ids = torch.arange(len(sizes)).repeat_interleave(lengths)
    within = torch.cat([torch.arange(size) for size, _, _ in sizes])
    prompts, answers = (torch.tensor(column)[ids] for column in list(zip(*sizes, strict=True))[1:])
    mask = (within >= prompts) & (within < prompts + answers)
    advantages = torch.tensor([1.3, -0.7, 0.4, 0.0, -1.9, 0.8, -0.2, 1.1])[torch.arange(len(sizes)) % 8].double()
    weight = 0.45 * randn(PADDED, HIDDEN)
    weight[VOCAB:] *= 1000  # padding may hold any value
    targets = torch.randint(VOCAB, (total,), generator=generator)
    batch = Batch(
        (0.5 * randn(total, HIDDEN).view(*shape, HIDDEN)).to(dtype),
        weight.to(dtype),
        tied,
        torch.randint(VOCAB, (total,), generator=generator).view(shape),
        torch.tensor([0, *lengths.cumsum(0).tolist()] if packed else [0, shape[-1]], dtype=torch.int32),
        {"targets": targets.view(shape)},
    )
    hidden, whole = batch.base.double(), batch.weight.double()
    if tied:
        hidden = hidden + 0.5 * whole[batch.tokens]
    logits = hidden.view(total, HIDDEN) @ whole[:VOCAB].t()
    logprobs = torch.log_softmax(logits / TEMPERATURE, -1).gather(-1, targets[:, None])[:, 0]
    log_ratios = pick(_LOG_RATIOS, total)
    for i in ids[mask].unique().tolist():
        # Rounding must not move a response's mean ratio across a clip either.
        own = mask & (ids == i)
        while min(abs(float(log_ratios[own].mean()) - clip) for clip in _LOG_CLIPS) < 0.03:
            log_ratios[own] = pick(_LOG_RATIOS, int(own.sum()))
    old = logprobs - log_ratios
    data = {
        "loss_mask": mask,
        "advantages": advantages[ids] + 0.05 * randn(total) * (advantages[ids] != 0),
        "old_logprobs": old,
        "ref_logprobs": logprobs + 0.4 * randn(total),
        "rollout_logprobs": old - pick(_ROLLOUT_LOG_RATIOS, total),
        "sequence_ids": 5 + 3 * ids,
    }
    fine = torch.float64 if dtype == torch.float64 else torch.float32
    data = {name: values.to(fine) if values.is_floating_point() else values for name, values in data.items()}
    batch.data.update({name: values.view(shape) for name, values in data.items()})
    return batch


def anchored(batch: Batch) -> Batch:
    """The batch with the old policy as its sampler and without old log-probs, for `anchor="rollout"`: the distance of
    its ratios from all clips is known."""
    data = {name: values for name, values in batch.data.items() if name != "old_logprobs"}
    return replace(batch, data=data | {"rollout_logprobs": batch.data["old_logprobs"]})


def reference(batch: Batch, config: PolicyLossConfig, dtype: torch.dtype | None = None) -> Reference:
    """The loss in float64, or in another `dtype` with logits upcast to float32 as frameworks do."""
    dtype = dtype or torch.float64
    base = batch.base.to(dtype, copy=True).requires_grad_()
    weight = batch.weight[:VOCAB].to(dtype, copy=True).requires_grad_()
    hidden = base + 0.5 * F.embedding(batch.tokens, weight) if batch.tied else base
    logits = hidden.reshape(-1, HIDDEN) @ weight.t()
    if dtype != torch.float64:
        logits = logits.float()
    surrogate, token_losses, denominator, logprobs, entropy = surrogate_of(logits / TEMPERATURE, batch.data, config)
    surrogate.backward()
    assert base.grad is not None
    assert weight.grad is not None
    padded = torch.zeros(PADDED, HIDDEN, dtype=weight.dtype)
    padded[:VOCAB] = weight.grad
    return Reference(
        float(token_losses.sum()),
        denominator,
        float(token_losses.abs().sum()),
        logprobs.detach().view(batch.tokens.shape),
        entropy.detach().view(batch.tokens.shape),
        base.grad,
        padded,
    )


def surrogate_of(
    logits: Tensor, data: dict[str, Tensor], config: PolicyLossConfig
) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    """The sum whose gradient is the loss's, from logits [T, V] at the policy's temperature; the tokens' losses [T], the
    denominator, log-probs and entropies [T]. `data` as in `Batch`, of any shape with T slots."""
    log_p = torch.log_softmax(logits, -1)
    data = {
        name: values.reshape(-1).to(log_p.dtype) if values.is_floating_point() else values.reshape(-1)
        for name, values in data.items()
    }
    logprobs = log_p.gather(-1, data["targets"][:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    weights, values, scale, denominator = _weights_and_values(logprobs.detach(), entropy.detach(), data, config)
    d = logprobs - data["ref_logprobs"]
    kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[config.kl_estimator]
    rest = config.kl_coef * kl - config.entropy_coef * entropy
    surrogate = (scale * (-weights * data["advantages"] * logprobs + rest)).sum()
    return surrogate, scale * (values + rest.detach()), denominator, logprobs, entropy


def _weights_and_values(
    logprobs: Tensor, entropy: Tensor, data: dict[str, Tensor], config: PolicyLossConfig
) -> tuple[Tensor, Tensor, Tensor, float]:
    """w rho, value rho, the aggregation's scale (each [T], 0 where masked), and the denominator. With the sampler as
    anchor the factor is 1 in its band and 0 outside instead of rho."""
    weights, values, scale = (torch.zeros_like(logprobs) for _ in range(3))
    mask, ids = data["loss_mask"], data["sequence_ids"]
    anchor = "rollout_logprobs" if config.anchor == "rollout" else "old_logprobs"
    names = (anchor, "advantages", "rollout_logprobs")
    responses = 0
    for i in ids.unique().tolist():
        where = (mask & (ids == i)).nonzero()[:, 0]
        length = len(where)
        if not length:
            continue
        responses += 1
        old, advantages, rollout = (data[name][where].tolist() for name in names)
        response = list(zip(logprobs[where].tolist(), old, advantages, strict=True))
        terms = response_terms(config, response, entropy[where].tolist())
        factors, _, _ = rollout_factors([math.exp(a - b) for a, b in zip(old, rollout, strict=True)], config)
        if config.anchor_band is not None:
            low, high = config.anchor_band
            factors = [float(low <= math.exp(now - then) <= high) for now, then, _ in response]
        weights[where] = logprobs.new_tensor([w * f for (w, _), f in zip(terms, factors, strict=True)])
        values[where] = logprobs.new_tensor([v * f for (_, v), f in zip(terms, factors, strict=True)])
        scale[where] = {
            "token-mean": 1.0,
            "seq-mean-token-mean": 1 / length,
            "seq-mean-token-sum": 1.0,
            "seq-mean-token-sum-norm": 1 / (config.norm_length or 1),
        }[config.aggregation]
    return weights, values, scale, float(mask.sum()) if config.aggregation == "token-mean" else float(responses)
