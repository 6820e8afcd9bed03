"""The policy loss of a whole stream over a whole vocabulary in plain autograd: the second opinion on the fused head.

Logits, log_softmax, and the surrogate: the sum of -w A rho log pi with w and rho frozen, the KL estimate and the
entropy bonus. Nothing of the package takes part but the configuration's fields.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aspo.config import PolicyLossConfig
from tests.unit.scalar_losses import scalar_quantile, scalar_terms

VOCAB, PADDED = 70, 96  # so that the last of four shards is padding alone
HIDDEN = 16
TEMPERATURE = 0.7

# log ratios at a distance from all clips: 0.6, 0.8, 1.3, 1.4, 3 and 1/3.
_LOG_RATIOS = (-1.6, -0.7, -0.35, -0.1, 0.05, 0.12, 0.45, 0.8, 1.6)
_LOG_CLIPS = tuple(math.log(r) for r in (0.6, 0.8, 1.3, 1.4, 3.0, 1 / 3))
_ROLLOUT_LOG_RATIOS = (-1.0, -0.3, 0.0, 0.02, 0.2, 0.9)


@dataclass(frozen=True)
class Batch:
    """A whole stream [T], or rows [B, T], in order; nothing is spoilt by masks.

    Attributes:
        base: [..., T, H], the hidden states; where the weight is tied, half the embeddings are added to them.
        weight: [PADDED, H]; the rows from VOCAB on are padding.
        tokens: what is embedded.
        part_of: segments that context parallelism cuts, each a multiple of 4 long.
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
    """What `Batch` and a configuration give; gradients are those of `loss_sum`.

    Attributes:
        size: sum of the tokens' |loss|, what an error of `loss_sum` is to be compared with.
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
    """Responses of 0 to 550 tokens behind prompts, ratios in every region of the clips.

    In all there are so many that chunks of 257 are several and uneven; packed, also on each of two context-parallel
    ranks.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def pick(values: tuple[float, ...], count: int) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (count,), generator=generator)]

    # (length with padding, prompt, response) of every sample.
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
    weight[VOCAB:] *= 1000  # padding may hold anything
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
        # No rounding may carry a response's mean ratio over a clip either.
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


def reference(batch: Batch, config: PolicyLossConfig, dtype: torch.dtype | None = None) -> Reference:
    """The loss in float64; with another `dtype`, in it, with the logits upcast to float32 as frameworks do."""
    dtype = dtype or torch.float64
    base = batch.base.to(dtype, copy=True).requires_grad_()
    weight = batch.weight[:VOCAB].to(dtype, copy=True).requires_grad_()
    hidden = base + 0.5 * F.embedding(batch.tokens, weight) if batch.tied else base
    logits = hidden.reshape(-1, HIDDEN) @ weight.t()
    if dtype != torch.float64:
        logits = logits.float()
    log_p = torch.log_softmax(logits / TEMPERATURE, -1)
    data = {
        name: values.reshape(-1).to(log_p.dtype) if values.is_floating_point() else values.reshape(-1)
        for name, values in batch.data.items()
    }
    logprobs = log_p.gather(-1, data["targets"][:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)

    weights, values, scale, denominator = _weights_and_values(logprobs.detach(), entropy.detach(), data, config)
    d = logprobs - data["ref_logprobs"]
    kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[config.kl_estimator]
    rest = config.kl_coef * kl - config.entropy_coef * entropy
    surrogate = (scale * (-weights * data["advantages"] * logprobs + rest)).sum()
    surrogate.backward()
    assert base.grad is not None
    assert weight.grad is not None
    token_losses = scale * (values + rest.detach())
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


def _weights_and_values(
    logprobs: Tensor, entropy: Tensor, data: dict[str, Tensor], config: PolicyLossConfig
) -> tuple[Tensor, Tensor, Tensor, float]:
    """w rho, value rho, the aggregation's scale (each [T], 0 where masked), and the denominator."""
    weights, values, scale = (torch.zeros_like(logprobs) for _ in range(3))
    mask, ids = data["loss_mask"], data["sequence_ids"]
    names = ("old_logprobs", "advantages", "rollout_logprobs")
    responses = 0
    for i in ids.unique().tolist():
        where = (mask & (ids == i)).nonzero()[:, 0]
        length = len(where)
        if not length:
            continue
        responses += 1
        old, advantages, rollout = (data[name][where].tolist() for name in names)
        low, high = [config.clip_low] * length, [config.clip_high] * length
        if config.entropy_quantile is not None:
            limit = scalar_quantile(entropy[where].tolist(), config.entropy_quantile)
            above = (entropy[where] > limit).tolist()
            low = [config.high_entropy_clip if a else x for a, x in zip(above, low, strict=True)]
            high = [config.high_entropy_clip if a else x for a, x in zip(above, high, strict=True)]
        response = list(zip(logprobs[where].tolist(), old, advantages, strict=True))
        terms = scalar_terms(config.objective, response, low, high, config.dual_clip)
        factors = _rollout_factors([a - b for a, b in zip(old, rollout, strict=True)], config)
        weights[where] = logprobs.new_tensor([w * f for (w, _), f in zip(terms, factors, strict=True)])
        values[where] = logprobs.new_tensor([v * f for (_, v), f in zip(terms, factors, strict=True)])
        scale[where] = {
            "token-mean": 1.0,
            "seq-mean-token-mean": 1 / length,
            "seq-mean-token-sum": 1.0,
            "seq-mean-token-sum-norm": 1 / (config.norm_length or 1),
        }[config.aggregation]
    return weights, values, scale, float(mask.sum()) if config.aggregation == "token-mean" else float(responses)


def _rollout_factors(log_ratios: list[float], config: PolicyLossConfig) -> list[float]:
    """The correction of each token of one response."""
    ratios = [math.exp(r) for r in log_ratios]
    low, high = config.rollout_sequence_low, config.rollout_sequence_high
    mean = math.exp(sum(log_ratios) / len(log_ratios))
    dropped = (low is not None and mean < low) or (high is not None and mean > high)
    dropped = dropped or (config.rollout_veto is not None and min(ratios) < config.rollout_veto)
    if dropped:
        return [0.0] * len(ratios)
    if config.rollout_correction == "truncate":
        return [min(r, config.rollout_ratio_high) for r in ratios]
    if config.rollout_correction == "mask":
        return [r if config.rollout_ratio_low <= r <= config.rollout_ratio_high else 0.0 for r in ratios]
    return [1.0] * len(ratios)
