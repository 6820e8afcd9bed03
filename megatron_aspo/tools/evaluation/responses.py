"""Responses to a benchmark: sampled and judged in chunks, and kept so that a killed evaluation can continue."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megatron_aspo.batch import Prompt
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.journal.files import write_atomically
from megatron_aspo.ranks.exchange import gather_texts
from megatron_aspo.rewards.scoring import Scorer, check_judged
from megatron_aspo.rollout.engine import RolloutEngine

RESPONSES_FILE = "responses.jsonl"
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Response:
    """A line of responses.jsonl.

    Attributes:
        sample: number of the response among those to its problem.
        length: tokens.
        unjudged: reason why the verifier reached no verdict; empty otherwise.
    """

    problem: str
    sample: int
    score: float
    finish_reason: Literal["stop", "length"]
    length: int
    text: str
    unjudged: str = ""

    @property
    def right(self) -> bool:
        return self.score >= 1 and not self.unjudged


def problems_hash(problems: Mapping[str, Prompt]) -> str:
    """Hash of all questions and answers, in order."""
    digest = hashlib.sha256()
    for name, prompt in problems.items():
        problem = [name, prompt.id, prompt.token_ids, prompt.entry]
        digest.update(json.dumps(problem, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def collect(
    folder: Path,
    settings: dict[str, Any],
    problems: Mapping[str, Prompt],
    engine: RolloutEngine,
    scorer: Scorer,
    problems_per_chunk: int,
) -> list[Response]:
    """All responses, `settings["samples"]` to every problem, in order. Those that `folder` holds are not sampled again.

    A response's random numbers depend on its problem and its number only, so the file does not depend on interruptions.

    Collective. Rank 0 reads and writes; the other ranks return an empty list.

    Raises:
        UserError: the folder cannot be used, or holds responses of other settings.
        RunError: more than `reward.max_unjudged` of a chunk's responses have no verdict, or another process wrote to
            the folder.
    """
    samples, temperature = settings["samples"], settings["temperature"]
    names = list(problems)
    is_first = dist.get_rank() == 0
    state: list[Any] = [None]  # number of problems done, or an error for all ranks
    if is_first:
        try:
            state = [_open(folder, settings)]
        except UserError as error:
            state = [error]
    dist.broadcast_object_list(state)
    if isinstance(state[0], UserError):
        raise state[0]
    done: int = state[0]
    if is_first:
        print(f"{folder.name}: {done} of {len(problems)} problems are done already", file=sys.stderr, flush=True)
    while done < len(problems):
        part = names[done : done + problems_per_chunk]
        sampled = engine.generate([problems[name] for name in part], samples, temperature)
        scorer.score(sampled)
        check_judged(sampled, scorer.config)
        texts = gather_texts(sampled)
        done += len(part)
        if is_first:
            made = [
                Response(name, number, s.score, s.finish_reason, s.response_length, text, s.unjudged)
                for (name, number), s, text in zip(itertools.product(part, range(samples)), sampled, texts, strict=True)
            ]
            with open(folder / RESPONSES_FILE, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(response)) + "\n" for response in made)
                file.flush()
                os.fsync(file.fileno())
            right = sum(response.right for response in made) / len(made)
            line = f"{folder.name}: {done} of {len(problems)} problems, {right:.1%} right in the last {len(part)}"
            print(line, file=sys.stderr, flush=True)
    if not is_first:
        return []
    with open(folder / RESPONSES_FILE, encoding="utf-8") as file:
        responses = [Response(**json.loads(line)) for line in file]
    if [(r.problem, r.sample) for r in responses] != list(itertools.product(names, range(samples))):
        raise RunError(f"another process wrote to {folder}; remove it, and let one evaluation at a time write there")
    return responses


def _open(folder: Path, settings: dict[str, Any]) -> int:
    """Cut off the responses to a problem that are incomplete. Returns the number of problems done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / SETTINGS_FILE).exists():
            (folder / RESPONSES_FILE).write_bytes(b"")
            write_json(folder / SETTINGS_FILE, settings)
        kept = json.loads((folder / SETTINGS_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use {folder}: {error}; name another with --out, or remove it") from None
    expected = json.loads(json.dumps(settings))
    differing = [
        f"{key}={kept.get(key)} there and {expected.get(key)} now"
        for key in sorted(expected | kept)
        if kept.get(key) != expected.get(key)
    ]
    if differing:
        raise UserError(
            f"{folder} holds responses of another evaluation: {', '.join(differing)}; name another folder with --out, "
            "or remove it"
        )
    with open(folder / RESPONSES_FILE, "rb+") as file:
        complete = [line for line in file if line.endswith(b"\n")]
        done = len(complete) // settings["samples"]
        file.truncate(sum(map(len, complete[: done * settings["samples"]])))
    return done


def write_json(path: Path, content: Any) -> None:
    with write_atomically(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
