"""Tools in the loop: responses of several turns, between which an environment writes observations.

Tokens go in and tokens come out: an observation's text is tokenised once and appended, and no token is tokenised again.
Observations are part of a response, within its limit of tokens. Their log-probs are 0 and their version is
`OBSERVATION`, by which loss, metrics and verifiers leave them out.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from pebble.concurrent import thread

from megatron_aspo.batch import OBSERVATION, Prompt
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import RunError
from megatron_aspo.ranks.gathering import gather_objects, sum_tables
from megatron_aspo.rollout.engine import Enough, Request, Response
from megatron_aspo.rollout.environments import open_environment

TOO_SLOW = math.inf
"""Score of a response whose environment took too long."""

AWAY = -math.inf
"""Score of a response whose environment raised an OSError: its server or sandbox is away."""

_Answer = tuple[tuple[int, ...] | None, float | None]
"""Tokens of the observation, if there is one, and score."""


class Environment(Protocol):
    """The surroundings of one response. It answers the same turns by the same observations: a resumed run repeats them.

    An attribute `score`, if it is a number when the response ends, takes the place of the verifier's. An OSError, as of
    a server that is away, leaves the response without a verdict; any other exception ends the run.
    """

    def reset(self, prompt: Prompt) -> None:
        """Called first. `prompt.entry` is the problem's row."""
        ...

    def step(self, response: str) -> str | None:
        """The text that the policy reads next, after the text of its turn; None ends the response."""
        ...


class Turns:
    """Plays the turns of an engine's responses; the engine calls it in place of its own `advance`.

    Each environment lives on one of the ranks that have its replica's responses. A turn is written by all replicas
    before any environment is asked.

    Args:
        engine: one of the package's own.
        make: constructor of an environment.
        workers: environments that a rank asks at once.
    """

    def __init__(self, engine: Any, config: RolloutConfig, make: Callable[[], Environment], workers: int) -> None:
        self._engine, self._config, self._make, self._workers = engine, config, make, workers
        self._running: dict[tuple[int, int], Environment] = {}  # of responses that go on

    def advance(self, requests: Sequence[Request], temperature: float, enough: Enough | None = None) -> list[Response]:
        """Play the responses of this replica's requests on from their prefixes, as an engine's `advance`. Collective
        over all replicas. Requests stay unfinished only between two turns.

        Raises:
            RunError: an environment raised an exception other than OSError.
        """
        responses, ended = [request.prefix for request in requests], set[int]()
        while True:
            is_enough = enough is not None and enough(ended)
            live = [] if is_enough else [i for i in range(len(requests)) if i not in ended]
            if not sum_tables(torch.tensor([len(live)])).item():
                return responses
            turns = self._engine.advance([replace(requests[i], prefix=responses[i]) for i in live], temperature)
            for i, response in zip(live, self._answered([requests[i] for i in live], turns), strict=True):
                responses[i] = response
                if response.finish_reason:
                    ended.add(i)

    def _answered(self, requests: Sequence[Request], turns: Sequence[Response]) -> list[Response]:
        """The responses with what the environments say to their last turns; with a finish reason if they have ended."""
        replica, writers = self._engine.replica, self._engine.writers[self._engine.replica]
        rank = dist.get_rank() if dist.is_initialized() else 0
        owned = [i for i, r in enumerate(requests) if writers[(r.prompt.id + r.replica) % len(writers)] == rank]
        asked = self._asked({i: (requests[i], turns[i]) for i in owned})
        own = {(replica, i): answer for i, (_, answer) in asked.items()}
        answers = {key: answer for share in gather_objects(own) for key, answer in share.items()}
        for answer in answers.values():
            if isinstance(answer, RunError):
                raise answer
        responses = [self._joined(turn, *answers[replica, i]) for i, turn in enumerate(turns)]
        for i, (environment, _) in asked.items():
            if environment is not None and not responses[i].finish_reason:
                self._running[_key(requests[i])] = environment
        return responses

    def _asked(
        self, turns: dict[int, tuple[Request, Response]]
    ) -> dict[int, tuple[Environment | None, _Answer | RunError]]:
        """The environments of this rank's responses and their answers. Each has its seconds for every turn that it is
        told, from when it is asked; the thread of one that takes longer is left behind, and another takes its place."""
        waiting, running = list(reversed(turns)), dict[Future[Any], tuple[int, float]]()
        asked: dict[int, tuple[Environment | None, _Answer | RunError]] = {}
        away: list[RunError] = []
        play = thread(self._play)  # daemons, which do not hold up the end of the process
        while waiting or running:
            while waiting and len(running) < self._workers:
                request, turn = turns[i := waiting.pop()]
                environment = self._running.pop(_key(request), None)
                call = play(environment, request, turn)
                told = len(turn.turns) if environment is None else 1  # all turns so far after a resume
                running[call] = i, time.monotonic() + told * self._config.environment_seconds
            first = min(deadline for _, deadline in running.values())
            wait(running, max(0.0, first - time.monotonic()), FIRST_COMPLETED)
            for call, (i, deadline) in list(running.items()):
                if not call.done() and time.monotonic() < deadline:
                    continue
                del running[call]
                if not call.done():
                    asked[i] = None, (None, TOO_SLOW)
                elif (error := call.exception()) is None:
                    asked[i] = call.result()
                elif isinstance(error, OSError):
                    away.append(self._failure(turns[i][0], error))
                    asked[i] = None, (None, AWAY)
                else:
                    asked[i] = None, self._failure(turns[i][0], error)
        if away:
            print(f"warning: {away[0]}", file=sys.stderr, flush=True)
        return asked

    def _joined(self, turn: Response, observation: tuple[int, ...] | None, score: float | None) -> Response:
        if observation is None:
            return replace(turn, score=score)
        count = len(observation)
        if len(turn.token_ids) + count >= self._config.max_response_tokens:  # no room for a further turn
            return replace(turn, finish_reason="length", score=score)
        observed = Response(
            np.array(observation, np.int32), np.zeros(count, np.float32), np.full(count, OBSERVATION, np.int32)
        )
        return replace(observed.after(turn), routes=turn.routes)

    def _play(
        self, environment: Environment | None, request: Request, response: Response
    ) -> tuple[Environment, _Answer]:
        """A response's environment and its answer to the last turn. A new environment first gets the turns before."""
        decode = self._engine.tokenizer.decode
        turns = [decode(tokens.tolist()) for tokens in response.turns]
        if environment is None:
            environment = self._make()
            environment.reset(request.prompt)
            for turn in turns[:-1]:
                environment.step(turn)
        text = environment.step(turns[-1]) if response.finish_reason == "stop" else None
        score = getattr(environment, "score", None)
        if score is not None and not math.isfinite(score):
            raise ValueError(f"score={score} is not finite")
        tokens = None
        if text is not None and len(turns) < self._config.max_turns:
            tokens = self._engine.tokenizer.encode(text)
            if not tokens:
                raise ValueError("an observation must have a token")
        return environment, (tokens, None if score is None else float(score))

    def _failure(self, request: Request, error: BaseException) -> RunError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        name, where = self._config.environment, f"for prompt {request.prompt.id}"
        return RunError(f"rollout.environment={name} failed {where}: {type(error).__name__}: {reason}")


def play_turns(engine: Any, config: RunConfig) -> Any:
    """The engine, which from now on plays the turns of `rollout.environment`, if there is one."""
    if config.rollout.environment:
        engine.turns = Turns(engine, config.rollout, *open_environment(config.rollout.environment, config.reward))
    return engine


def _key(request: Request) -> tuple[int, int]:
    return request.prompt.id, request.replica
