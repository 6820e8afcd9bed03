"""Tables of samples: a row of numbers for each, from which every rank makes the samples that it does not own.

Prompts are not in them, because every rank has drawn them. Arrays travel by `ranks.exchange`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.tokenizer import Tokenizer
from megatron_aspo.errors import RunError
from megatron_aspo.ranks.exchange import array_bytes, deliver, pack_arrays, unpack_arrays, without_arrays
from megatron_aspo.ranks.gathering import gather_objects, sum_tables, table_bytes
from megatron_aspo.ranks.lanes import SAMPLES, Lanes, peers_of
from megatron_aspo.rewards.scoring import SCORES
from megatron_aspo.rollout.engine import Request, Response

_INTEGERS = ("group", "weight_version", "response_length", "written_length", "turns", "owner")
_NUMBERS = (
    *_INTEGERS,
    *("score", "reward", "advantage", "repetition", "repetition_words"),
)
"""Fields of `Sample` in a row. Behind them: the prompt's id and checksum, whether the response was cut at its limit,
the environment's score, whether it has versions of its own, and layers and experts per token of its routes."""

DIFFERENT_PROMPTS = (
    "ranks have drawn different prompts; the problems and the tokenizer must be the same on all hosts (data.path, "
    "model.hf_path)"
)

COLUMNS = len(_NUMBERS) + 7


def share(
    requests: Sequence[Request],
    owners: Sequence[int],
    written: Iterable[tuple[Request, Response]],
    tokenizer: Tokenizer,
    spread: int = 1,
) -> list[Sample]:
    """The samples of all requests, in order; each rank has the arrays and texts of its own. Collective.

    Args:
        owners: owner of each request's sample.
        written: responses of this rank; the owners' count.
        spread: ranks that an owner deals its samples out to, itself and those behind it.
    """
    own: dict[int, Sample] = {}
    rank = dist.get_rank() if dist.is_initialized() else 0
    table = torch.zeros(len(requests), COLUMNS, dtype=torch.float64)
    for request, response in written:
        if owners[request.index] == rank:
            text = tokenizer.decode(response.token_ids[response.versions >= 0].tolist())
            own[request.index] = sample = response.sample(request.prompt, request.group, text)
            sample.owner = rank
            table[request.index] = _to_row(sample)
    prompts = {request.prompt.id: request.prompt for request in requests}
    samples = [own.get(i, sample) for i, sample in enumerate(from_table(sum_tables(table), prompts))]
    return samples if spread == 1 else _dealt_out(samples, spread, tokenizer)


def _dealt_out(samples: Sequence[Sample], spread: int, tokenizer: Tokenizer) -> list[Sample]:
    """The samples with new owners: otherwise a few ranks would judge all of them, and send all of their routes."""
    dealt: Counter[int] = Counter()
    owners: list[int] = []
    for sample in samples:
        owners.append(sample.owner + dealt[sample.owner] % spread)
        dealt[sample.owner] += 1
    delivered = [
        replace(sample if owner == dist.get_rank() else without_arrays(sample), owner=owner)
        for sample, owner in zip(deliver(samples, [(owner,) for owner in owners]), owners, strict=True)
    ]
    for sample in delivered:
        if sample.owner == dist.get_rank():
            sample.text = sample.text or tokenizer.decode(sample.written.tolist())
    return delivered


def to_table(samples: Sequence[Sample]) -> Tensor:
    """[samples, COLUMNS] float64."""
    return torch.stack([_to_row(s) for s in samples]) if samples else torch.zeros(0, COLUMNS, dtype=torch.float64)


def _to_row(sample: Sample) -> Tensor:
    layers, k = (0, 0) if sample.routes is None else sample.routes.shape[1:]
    row = [getattr(sample, name) for name in _NUMBERS]
    row += [sample.prompt.id, _checksum(sample.prompt), sample.finish_reason == "length"]
    row += [math.nan if sample.environment_score is None else sample.environment_score]
    return torch.tensor([*row, sample.versions is not None, layers, k], dtype=torch.float64)


def from_table(table: Tensor, prompts: Mapping[int, Prompt]) -> list[Sample]:
    """The samples without arrays and text.

    Args:
        prompts: those of the samples, by id.

    Raises:
        RunError: the samples are of other prompts.
    """
    return [_from_row(row, prompts) for row in table.tolist()]


def _from_row(row: Sequence[float], prompts: Mapping[int, Prompt]) -> Sample:
    numbers: dict[str, Any] = dict(zip(_NUMBERS, row, strict=False))
    number, checksum, cut, environment_score, versions, layers, k = row[len(_NUMBERS) :]
    prompt = prompts.get(int(number))
    if prompt is None or _checksum(prompt) != checksum:
        raise RunError(DIFFERENT_PROMPTS)
    for name in _INTEGERS:
        numbers[name] = int(numbers[name])
    return Sample(
        prompt=prompt,
        token_ids=np.empty(0, np.int32),
        finish_reason="length" if cut else "stop",
        rollout_logprobs=np.empty(0, np.float32),
        versions=np.empty(0, np.int32) if versions else None,
        routes=np.empty((0, int(layers), int(k)), np.uint8) if k else None,
        environment_score=None if math.isnan(environment_score) else environment_score,
        **numbers,
    )


def _checksum(prompt: Prompt) -> int:
    return hash(prompt.token_ids) & 0xFFFFFFFF  # the same in every process: only hashes of strings are not


def send(lanes: Lanes, samples: Sequence[Sample]) -> None:
    """Send the arrays of this rollout rank's samples to the training ranks that become their owners."""
    for sender, reader, chosen in _transfers(samples, dist.get_world_size(), lanes.others):
        if sender == dist.get_rank():
            lanes.send(reader, pack_arrays([samples[i] for i in chosen]), SAMPLES)


def receive(lanes: Lanes, samples: Sequence[Sample], tokenizer: Tokenizer) -> list[Sample]:
    """Inverse of `send` on a training rank: the samples with new owners, and with this rank's arrays and texts.

    Raises:
        PeerLostError: a rollout rank has ended.
    """
    received = list(samples)
    failure: RunError | None = None  # raised by all ranks
    for sender, reader, chosen in _transfers(samples, lanes.others, dist.get_world_size()):
        part = [samples[i] for i in chosen]
        if reader == dist.get_rank():
            buffer = torch.empty(sum(map(array_bytes, part)), dtype=torch.uint8)
            try:
                part = unpack_arrays(part, lanes.receive(sender, buffer, SAMPLES))
            except RunError as error:
                failure = error
                break
            for sample in part:
                sample.text = tokenizer.decode(sample.written.tolist())
        for i, sample in zip(chosen, part, strict=True):
            received[i] = replace(sample, owner=reader)
    for error in gather_objects(failure):
        if error is not None:
            raise error
    return received


def received_bytes(
    config: RunConfig,
    ranks: int,
    prompt_tokens: int,
    response_tokens: int,
    *,
    layers: int = 0,
    stage_layers: int = 0,
    top_k: int = 0,
) -> int:
    """Bytes of samples and tables that a training rank receives in a step, at most: none of its samples are its own.

    Args:
        ranks: training ranks.
        layers, stage_layers: with experts, of the model and of the rank's pipeline stage. For `router_replay=sampler`,
            as `top_k` is, the experts of a token.
    """
    rollout, parallel = config.rollout, config.parallel
    count = rollout.prompts_per_step * rollout.responses_per_prompt
    prompt, none = Prompt(0, "", (0,) * prompt_tokens, {}), np.empty(0, np.int32)
    sample = Sample(prompt, 0, none, "stop", rollout_logprobs=none.astype(np.float32), response_length=response_tokens)
    if rollout.in_flight or rollout.oversample > 1 or rollout.environment:
        sample.versions = none
    if config.train.router_replay == "sampler":
        sample.routes = np.empty((0, layers, top_k), np.uint8)
    trained = math.ceil(count * parallel.tensor * parallel.pipeline * parallel.context / ranks)
    received = trained * array_bytes(sample, range(stage_layers))
    owned = math.ceil(count / ranks) * array_bytes(sample)
    if rollout.ranks:  # through the lanes, as an owner
        return received + 8 * COLUMNS * count + owned
    dealt_out = owned if sample.routes is not None and rollout.tensor > 1 else 0
    return received + dealt_out + table_bytes(torch.empty(count, COLUMNS + SCORES, dtype=torch.float64))


def _transfers(samples: Sequence[Sample], senders: int, readers: int) -> Iterator[tuple[int, int, list[int]]]:
    """Yield a rollout rank, a training rank, and the indices of the samples that go from one to the other. The samples
    of a rollout rank are dealt out to its peers."""
    for sender in range(senders):
        owned = [i for i, sample in enumerate(samples) if sample.owner == sender]
        peers = peers_of(sender, senders, readers)
        for n, reader in enumerate(peers):
            if chosen := owned[n :: len(peers)]:
                yield sender, reader, chosen
