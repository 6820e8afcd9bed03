"""Some of a step's responses for `samples.jsonl`, with the ratio and weight of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.batch import MicroBatch, Sample
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.data.tokenizer import Tokenizer
from megatron_aspo.journal.journal import Journal
from megatron_aspo.loss.token_loss import TokenLoss
from megatron_aspo.loss.tokens import TokenBatch, usable
from megatron_aspo.policy.packing import unpack
from megatron_aspo.ranks.exchange import deliver

if TYPE_CHECKING:
    from megatron_aspo.policy.trainer import Policy

_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, hence the most tokens of a byte-level tokenizer."""


def is_logged(step: int, train: TrainConfig) -> bool:
    """Whether samples of the step are written."""
    every = train.log_samples_every
    return train.log_samples > 0 and (step == train.steps or (every > 0 and step % every == 0))


def log_samples(
    step: int,
    policy: Policy,
    mini_batches: Sequence[tuple[Sequence[Sequence[Sample]], Sequence[MicroBatch]]],
    tokenizer: Tokenizer,
    journal: Journal,
) -> None:
    """Write the first `train.log_samples` groups of a step, after its updates. Collective.

    This takes one forward pass over the mini-batches that hold these groups. It draws no random numbers and leaves no
    state behind, so a run with it is to the bit the run without.

    Args:
        mini_batches: groups of each mini-batch, and its micro-batches with the anchor's log-probs.
    """
    missing, lines = policy.config.train.log_samples, list[dict[str, Any]]()
    for groups, batches in mini_batches:
        samples = [sample for group in groups[:missing] for sample in group]
        missing -= len(groups[:missing])
        if samples:
            table = score(policy, samples, batches)
            samples = deliver(samples, [(0,)] * len(samples), [()] * dist.get_world_size())  # without routes
            if journal.is_rank_0:
                for sample in samples:
                    sample.text = sample.text or tokenizer.decode(sample.written.tolist())  # only its owner has it
                columns = token_columns(samples, table, policy.config.loss)
                lines += records(step, samples, columns, tokenizer)
    journal.record_samples(step, lines)


def score(policy: Policy, samples: Sequence[Sample], batches: Sequence[MicroBatch]) -> Tensor:
    """The anchor's log-probs, log-probs and entropy by the current weights, of every response token. Collective.

    Args:
        samples: the first samples of a mini-batch.
        batches: the mini-batch's micro-batches, with the log-probs of `loss.anchor`.

    Returns:
        [3, samples, longest response], the same on every rank, on the CPU; 0 behind a response's end.
    """
    current = policy.logprobs(batches, entropy=True)
    table = torch.zeros(3, len(samples), max(sample.response_length for sample in samples), device=policy.device)
    if policy.is_last_stage:
        name = "rollout_logprobs" if policy.config.loss.anchor == "rollout" else "old_logprobs"
        anchor = [getattr(batch, name)[None] for batch in batches]
        table = unpack(samples, batches, [torch.cat(pair) for pair in zip(anchor, current, strict=True)])
        dist.all_reduce(table, group=policy.dp_cp_group)
    dist.broadcast(table, src=policy.last_stage, group=policy.pp_group)
    return table.cpu()


def token_columns(samples: Sequence[Sample], table: Tensor, loss: PolicyLossConfig) -> dict[str, Tensor]:
    """The columns of `samples.jsonl` for every response token, by the names there.

    Args:
        table: from `score`.

    Returns:
        [samples, longest response] each, undefined behind a response's end. `logprob` and `entropy` are by the weights
        after the updates, `ratio` relates them to `loss.anchor`, `weight` and the clips are of the next update.
    """
    # The settings whose inputs are missing here affect neither ratio nor weight.
    loss = replace(
        loss, aggregation="token-mean", rollout_sequence_low=None, rollout_sequence_high=None, rollout_veto=None
    )
    anchor, logprobs, entropy = table
    lengths = torch.tensor([sample.response_length for sample in samples])
    mask = torch.arange(logprobs.shape[1]) < lengths[:, None]
    for row, sample in enumerate(samples):
        if sample.versions is not None:
            mask[row, : sample.response_length] = torch.from_numpy(sample.versions >= 0)
    advantages = torch.tensor([sample.advantage for sample in samples])[:, None].expand_as(logprobs)
    tokens = TokenBatch(None, mask, advantages, anchor, rollout_logprobs=anchor).flattened(logprobs.dtype)
    flat, flat_entropy = usable(logprobs.reshape(-1), tokens.loss_mask), entropy.reshape(-1)
    inputs, terms = TokenLoss.from_tokens(tokens, loss, None, flat, flat_entropy).terms(flat, flat_entropy)
    columns = {
        "logprob": logprobs,
        "ratio": inputs.ratio,
        "weight": terms.weight,
        "entropy": entropy,
        "hard_clipped": terms.hard_clipped,
        "soft_clipped": terms.soft_clipped,
    }
    return {name: column.view_as(logprobs) for name, column in columns.items()}


def records(
    step: int, samples: Sequence[Sample], columns: dict[str, Tensor], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """A line of `samples.jsonl` for each group: its prompt and responses."""
    lines: dict[int, dict[str, Any]] = {}
    for row, sample in enumerate(samples):
        first = {"step": step, "group": sample.group, "prompt": sample.prompt.text, "responses": []}
        lines.setdefault(sample.group, first)["responses"].append(
            {
                "text": sample.text,
                "score": sample.score,
                "reward": sample.reward,
                "advantage": sample.advantage,
                "finish_reason": sample.finish_reason,
                "versions": spans(sample),
                "tokens": token_pieces(sample.token_ids.tolist(), tokenizer),
                **{name: _listed(column[row, : sample.response_length]) for name, column in columns.items()},
            }
        )
    return list(lines.values())


def spans(sample: Sample) -> list[list[int]]:
    """The versions of the weights that wrote the response, or `OBSERVATION`, with their numbers of tokens, in order."""
    if sample.versions is None:
        return [[sample.weight_version, sample.response_length]]
    parts = np.split(sample.versions, np.flatnonzero(np.diff(sample.versions)) + 1)
    return [[int(part[0]), len(part)] for part in parts]


def _listed(values: Tensor) -> list[Any]:
    """Indices of the tokens with True, or numbers with six digits: more would double the file."""
    if values.dtype == torch.bool:
        return values.nonzero()[:, 0].tolist()
    return [float(f"{value:.6g}") for value in values.tolist()]


def token_pieces(token_ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token, special tokens by name; joined they are the response. The last of several tokens of one
    character has the character, the others are empty."""
    pieces: list[str] = []
    start = 0  # of the tokens that are not in a piece yet
    for end in range(1, len(token_ids) + 1):
        # One token of context: a tokenizer may drop a leading space.
        context = token_ids[max(0, start - 1) : start]
        text = tokenizer.decode([*context, *token_ids[start:end]], special=True)
        text = text[len(tokenizer.decode(context, special=True)) :]
        if text.endswith("\ufffd") and end < len(token_ids) and end - start < _LONGEST_CHARACTER:
            pieces.append("")
        else:
            pieces.append(text)
            start = end
    return pieces
