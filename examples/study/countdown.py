"""Modular countdown with retries: the task of the study.

A prompt `2356T4:` asks for an expression with the numbers 2, 3, 5 and 6, each used once, that is 4 modulo 7. A response
is up to five attempts such as `5+6=4*2=1-3=5`, read from left to right, each with the writer's verdict: `Y` claims
success, `N` tries again. The response ends after `Y`, or after `N` to give up.

The reward is 1 if the last attempt is exact, hits the target and is claimed, otherwise 0. No part of it can be had by
length or padding. A response that repeats a failed attempt wastes one of five.

    .venv/bin/python examples/study/countdown.py FOLDER

writes `problems.jsonl`, for training and the supervised warm-up, and `held_out.jsonl`, for evaluation.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from megatron_aspo.batch import Sample
from megatron_aspo.journal.files import write_atomically
from megatron_aspo.rewards.verdict import Verdict

MODULUS = 7
NUMBERS = 4
ATTEMPTS = 5
END = "\x04"
"""The tokenizer's end-of-sequence character."""

PROBLEMS, HELD_OUT = 60_000, 256
_SEED = 7

_ATTEMPT = re.compile(r"[0-6]([-+*][0-6]=[0-6]){3}")


@dataclass(frozen=True)
class Problem:
    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return f"{''.join(map(str, self.numbers))}T{self.target}:"

    @classmethod
    def from_prompt(cls, prompt: str) -> Problem:
        numbers, target = prompt.rstrip(":").split("T")
        return cls(tuple(map(int, numbers)), int(target))

    @property
    def is_held_out(self) -> bool:
        """Whether the class of the problem, its target and its numbers in any order, is left out of training: a tenth
        of the classes."""
        return zlib.crc32(f"{sorted(self.numbers)}{self.target}".encode()) % 10 == 0


def apply(operator: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % MODULUS


def is_correct(problem: Problem, response: str) -> bool:
    """Whether the last attempt uses every number once, has exact results, hits the target, is claimed by `Y` and ends
    the response."""
    attempt = response.removesuffix(f"Y{END}").rpartition("N")[2]
    if not response.endswith(f"Y{END}") or not _ATTEMPT.fullmatch(attempt):
        return False
    used, result = [int(attempt[0])], int(attempt[0])
    for i in range(1, len(attempt), 4):
        operator, operand, _, written = attempt[i : i + 4]
        result = apply(operator, result, int(operand))
        if result != int(written):
            return False
        used.append(int(operand))
    return sorted(used) == sorted(problem.numbers) and result == problem.target


def attempts_of(response: str) -> list[str]:
    """The attempts of a response, without verdicts; malformed ones too."""
    return [attempt for attempt in re.split(f"[NY{END}]", response) if attempt]


class Judge:
    """The study's `Verifier`. Its metrics, means over responses:

    - attempts;
    - retries: attempts after the first;
    - repeats: retries that equal an earlier attempt of the response;
    - new: whether the response is correct and its last attempt differs from that of the prompt's earlier correct ones.
    """

    def __init__(self) -> None:
        self._group: tuple[int, int] | None = None
        self._found: set[str] = set()

    def submit(self, sample: Sample) -> Future[Verdict]:
        # Control characters are no part of a sample's text, and a response that has some is wrong.
        response = bytes(sample.token_ids.tolist()).decode("ascii")
        attempts = attempts_of(response)
        correct = is_correct(Problem.from_prompt(sample.prompt.text), response)
        group = (sample.prompt.id, sample.weight_version)
        if group != self._group:
            self._group, self._found = group, set()
        new = correct and attempts[-1] not in self._found
        if new:
            self._found.add(attempts[-1])
        metrics = {
            "attempts": float(len(attempts)),
            "retries": float(max(len(attempts) - 1, 0)),
            "repeats": float(len(attempts) - len(set(attempts))),
            "new": float(new),
        }
        verdict: Future[Verdict] = Future()
        verdict.set_result(Verdict(float(correct), "", metrics=metrics))
        return verdict

    def close(self) -> None:
        """Nothing to release."""


def draw_attempt(numbers: tuple[int, ...], rng: random.Random, errors: float = 0.0) -> tuple[str, int]:
    """A random expression of the numbers, and the result that is written behind it. A share `errors` of the written
    intermediate results is random."""
    order = rng.sample(numbers, NUMBERS)
    return write(order, rng.choices("+-*", k=NUMBERS - 1), rng, errors)


def write(order: list[int], operators: list[str], rng: random.Random, errors: float = 0.0) -> tuple[str, int]:
    text, result = str(order[0]), order[0]
    for operator, operand in zip(operators, order[1:], strict=True):
        result = apply(operator, result, operand)
        if rng.random() < errors:
            result = rng.randrange(MODULUS)
        text += f"{operator}{operand}={result}"
    return text, result


def draw_problem(rng: random.Random, held_out: bool) -> Problem:
    """A random problem with a solution."""
    while True:
        numbers = tuple(rng.randrange(MODULUS) for _ in range(NUMBERS))
        problem = Problem(numbers, draw_attempt(numbers, rng)[1])
        if problem.is_held_out == held_out:
            return problem


def demonstrate(
    problem: Problem,
    rng: random.Random,
    planned: float = 0.2,
    repeated: float = 0.25,
    errors: float = 0.03,
    false_claims: float = 0.04,
    gives_up: float = 0.35,
) -> str:
    """A response of mixed quality, without the end mark.

    Args:
        planned: share of attempts that hit the target, apart from chance and errors.
        repeated: share of the other retries that repeat the expression of the attempt before.
        errors: share of intermediate results that are random.
        false_claims: share of missed targets that are claimed.
        gives_up: probability to end after a failure.
    """
    response, chain = "", ([0], [""])
    for attempt in range(ATTEMPTS):
        if not attempt or rng.random() >= repeated:
            chain = rng.sample(problem.numbers, NUMBERS), rng.choices("+-*", k=NUMBERS - 1)
        if rng.random() < planned:
            for _ in range(40):
                chain = rng.sample(problem.numbers, NUMBERS), rng.choices("+-*", k=NUMBERS - 1)
                if write(*chain, rng)[1] == problem.target:
                    break
        text, result = write(*chain, rng, errors)
        response += text
        if result == problem.target or rng.random() < false_claims:
            return f"{response}Y"
        response += "N"
        if rng.random() < gives_up:
            break
    return response


def write_files(folder: Path) -> tuple[Path, Path]:
    """Write the files unless they exist, and return their paths. Their modification time is part of the key of cached
    warm starts, so files that exist stay."""
    training, held_out = folder / "problems.jsonl", folder / "held_out.jsonl"
    rng = random.Random(_SEED)
    problems = [draw_problem(rng, held_out=False) for _ in range(PROBLEMS)]
    rows = [{"prompt": problem.prompt, "answer": demonstrate(problem, rng)} for problem in problems]
    questions: dict[str, None] = {}
    while len(questions) < HELD_OUT:
        questions[draw_problem(rng, held_out=True).prompt] = None
    folder.mkdir(parents=True, exist_ok=True)
    for path, lines in ((training, rows), (held_out, [{"prompt": prompt} for prompt in questions])):
        if not path.exists():
            with write_atomically(path) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return training, held_out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for path in write_files(parser.parse_args().folder):
        print(path)
