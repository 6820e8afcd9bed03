"""The environments of `rollout.environment`: a Python tool, further tries at a task, a game, and the user's own."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from megatron_aspo.batch import Prompt
from megatron_aspo.config.import_path import check_signature, import_object
from megatron_aspo.config.rewards import RewardConfig
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.verdict import after_reasoning

WORKERS = 32
"""Environments that a rank asks at once. They wait for servers rather than compute."""

LONGEST_OUTPUT = 4096
"""Characters of a program's output that the policy reads."""


class PythonTool:
    """Runs the last ```python block of a turn in a sandbox (`reward.code`); the observation is what it prints,
    without the middle if that is long.

    Each block runs alone: names of earlier blocks are unknown to it. A turn without a block ends the response, which
    the verifier then judges. With rollout.stop=["```\\n"] a turn ends behind its block.
    """

    def __init__(self, verifier: Any) -> None:
        self._verifier = verifier

    def reset(self, prompt: Prompt) -> None: ...

    def step(self, response: str) -> str | None:
        printed = self._verifier.output_of(response)
        if printed is None:
            return None
        if (left_out := len(printed) - LONGEST_OUTPUT) > 0:
            half = LONGEST_OUTPUT // 2
            printed = f"{printed[:half]}\n[... {left_out} characters ...]\n{printed[-half:]}"
        return f"\n```output\n{printed.rstrip()}\n```\n"


class Retry:
    """Lets the policy answer a reasoning-gym task again after a wrong answer, which the task's verifier judges."""

    score = 0.0

    def reset(self, prompt: Prompt) -> None:
        self._entry = prompt.entry

    def step(self, response: str) -> str | None:
        from megatron_aspo.rewards.reasoning_gym import judge

        self.score = judge(response, self._entry)
        return None if self.score >= 1 else "wrong, again: "


class Sokoban:
    """Plays a board of reasoning-gym's task sokoban, whose verifier scores the moves of all turns together.

    The moves of a turn are the words of L, D, U and R in its last line, behind its reasoning. The observation is the
    board in the prompt's notation. A turn without a move ends the game.
    """

    score = 0.0

    def reset(self, prompt: Prompt) -> None:
        from reasoning_gym.games.contrib.sokoban.src.game import Game

        board = [row.split() for row in prompt.entry["metadata"]["gamestr"].strip().splitlines()]
        self._entry, self._moves = prompt.entry, ""
        self._game: Any = Game(width=len(board[0]), height=len(board))
        self._game.load_puzzle_matrix(board)

    def step(self, response: str) -> str | None:
        from megatron_aspo.rewards.reasoning_gym import judge

        moves = "".join(re.findall(r"\b[LDUR]+\b", after_reasoning(response).strip().rpartition("\n")[2]))
        for move in moves:
            self._game.player.update(key=move)
        self._moves += moves
        self.score = judge(self._moves, self._entry)
        if not moves or self.score >= 1:
            return None
        return "\n" + "".join(" ".join(row) + "\n" for row in self._game.get_matrix())


@functools.cache
def open_environment(name: str, config: RewardConfig) -> tuple[Callable[[], Any], int]:
    """The environment's constructor, and the number of environments that a rank steps at once. Cached, because it is
    also called before the model is built, to raise early.

    Raises:
        UserError: it cannot work here.
    """
    if name == "python":
        from megatron_aspo.rewards.programs.verifier import CodeVerifier

        return functools.partial(PythonTool, CodeVerifier(config.code)), config.code.processes
    if name in ("retry", "sokoban"):
        from megatron_aspo.rewards.reasoning_gym import import_reasoning_gym

        import_reasoning_gym()  # in this thread: an import takes seconds
        return Retry if name == "retry" else Sokoban, WORKERS
    return import_environment(name), WORKERS


def import_environment(name: str) -> Callable[[], Any]:
    """The constructor of the user's environment. Raises UserError unless it makes one with both methods."""
    make = import_object(name)
    check_signature(name, make)
    try:
        made = make()
    except Exception as error:  # whatever the user's class raises
        raise UserError(f"rollout.environment={name}() fails: {type(error).__name__}: {error}; fix it") from error
    for method, argument in (("reset", "prompt"), ("step", "response")):
        if not callable(function := getattr(made, method, None)):
            raise UserError(f"rollout.environment={name} has no method {method}; Environment requires it")
        check_signature(f"{name}.{method}", function, argument)
    return make
