"""Top-k and top-p by sorting, after vLLM's rule (`apply_top_k_top_p` of its sampler): the tests' second opinion."""

import torch
from torch import Tensor


def kept_tokens(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """[n, V] bool. Logits are compared in float32, and tokens that tie with the last one kept are kept."""
    z = logits.float().double() / temperature
    if top_k is not None:
        kth_largest = z.sort(-1, descending=True).values[:, min(top_k, z.shape[-1]) - 1]
        z = z.masked_fill(z < kth_largest[:, None], -torch.inf)
    if top_p is not None and top_p < 1:
        ascending, order = z.sort(-1)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[:, -1] = False  # at least one stays
        z = z.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -torch.inf)
    lowest = z.masked_fill(z.isneginf(), torch.inf).amin(-1)
    return logits.float().double() / temperature >= lowest[:, None]


def truncated_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy [n] in float64, differentiable by torch; -inf for a target that is not kept."""
    kept = kept_tokens(logits.detach(), temperature, top_k, top_p)
    log_p = torch.log_softmax((logits.double() / temperature).masked_fill(~kept, -torch.inf), -1)
    possible = log_p > -torch.inf
    entropy = -torch.where(possible, log_p.exp() * log_p.where(possible, 0.0), 0.0).sum(-1)
    chosen = targets[:, None]
    logprobs = torch.where(possible.gather(-1, chosen), log_p.gather(-1, chosen), -torch.inf)
    return logprobs[:, 0], entropy


def least_distance_from_p(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> float:
    """How near the mass of the tokens above any token comes to p: where they meet, rounding decides."""
    if top_p is None:
        return 1.0
    z = logits.float().double() / temperature
    p = z.masked_fill(~kept_tokens(logits, temperature, top_k, None), -torch.inf).softmax(-1)
    above = torch.where(z[:, :, None] > z[:, None, :], p[:, :, None], 0.0).sum(1)
    return float((above - top_p).abs().min())
