"""The study's task: its verifier against another way to judge, its shares of luck, and its split."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_aspo.batch import Prompt, Sample

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "study"))

import countdown
from countdown import END, Judge, Problem, attempts_of, demonstrate, draw_problem, is_correct

PROBLEM = Problem((2, 3, 5, 6), 4)


def accepted(problem: Problem) -> set[str]:
    """Every attempt that is right, by enumeration of all orders and operators; Python evaluates the expressions."""
    attempts: set[str] = set()
    for order in set(itertools.permutations(problem.numbers)):
        for operators in itertools.product("+-*", repeat=3):
            value, text = order[0], str(order[0])
            for operator, number in zip(operators, order[1:], strict=True):
                value = eval(f"({value}{operator}{number}) % 7")
                text += f"{operator}{number}={value}"
            if value == problem.target:
                attempts.add(text)
    return attempts


def test_exactly_the_right_attempts_are_accepted() -> None:
    """All single-character changes of right attempts, and all attempts of another problem, are judged alike."""
    rng = random.Random(1)
    for _ in range(20):
        problem = draw_problem(rng, held_out=False)
        right = accepted(problem)
        assert right
        assert all(is_correct(problem, f"{attempt}Y{END}") for attempt in right)
        for attempt in rng.sample(sorted(right), 3):
            for i, c in itertools.product(range(len(attempt)), "0123456789+-*=NYT "):
                changed = attempt[:i] + c + attempt[i + 1 :]
                assert is_correct(problem, f"{changed}Y{END}") == (changed in right), changed
        for attempt in accepted(draw_problem(rng, held_out=False)):
            assert is_correct(problem, f"{attempt}Y{END}") == (attempt in right)


RIGHT = sorted(accepted(PROBLEM))[0]
WRONG = sorted(accepted(Problem(PROBLEM.numbers, 5)))[0]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (f"{RIGHT}Y{END}", 1),
        (f"{WRONG}N{RIGHT}Y{END}", 1),
        (f"{RIGHT}N{RIGHT}Y{END}", 1),
        (f"{RIGHT}Y", 0),  # cut at the limit
        (f"{RIGHT}N{END}", 0),  # not claimed
        (f"{RIGHT}{END}", 0),
        (f"{WRONG}Y{END}", 0),
        (f"{RIGHT}Y{RIGHT}Y{END}", 0),
        (f"{RIGHT}YY{END}", 0),
        (f"{RIGHT}Y{WRONG}Y{END}", 0),
        (f"{RIGHT}{RIGHT}Y{END}", 0),
        (f"\x00{RIGHT}Y{END}", 0),
        (f"{RIGHT}N{RIGHT[:-1]}Y{END}", 0),
        (f"Y{END}", 0),
        (END, 0),
        ("", 0),
    ],
)
def test_the_last_attempt_must_be_right_claimed_and_the_end(response: str, score: float) -> None:
    assert is_correct(PROBLEM, response) == score
    sample = Sample(Prompt(0, PROBLEM.prompt, (), {}), 0, np.array([*response.encode()], np.int32), "stop")
    assert Judge().submit(sample).result().score == score


def test_a_random_attempt_hits_the_target_once_in_six() -> None:
    """1/7, and more because products of 0 are frequent."""
    rng, hits = random.Random(2), 0
    for _ in range(20_000):
        problem = draw_problem(rng, held_out=False)
        hits += countdown.draw_attempt(problem.numbers, rng)[1] == problem.target
    assert hits / 20_000 == pytest.approx(0.17, abs=0.012)


def test_judges_count_repetition_and_distinct_solutions() -> None:
    judge = Judge()
    others = [attempt for attempt in sorted(accepted(PROBLEM)) if attempt != RIGHT]

    def metrics(response: str, prompt: int = 0, version: int = 0) -> dict[str, float]:
        tokens = np.array([*response.encode()], np.int32)
        sample = Sample(Prompt(prompt, PROBLEM.prompt, (), {}), 0, tokens, "stop", weight_version=version)
        return dict(judge.submit(sample).result().metrics)

    assert attempts_of(f"{WRONG}N{RIGHT}Y{END}") == [WRONG, RIGHT]
    assert metrics(f"{WRONG}N{WRONG}N{RIGHT}N{WRONG}N{END}") == {"attempts": 4, "retries": 3, "repeats": 2, "new": 0}
    assert metrics(END) == {"attempts": 0, "retries": 0, "repeats": 0, "new": 0}
    assert metrics(f"{RIGHT}Y{END}")["new"] == 1
    assert metrics(f"{WRONG}N{RIGHT}Y{END}")["new"] == 0  # the same solution
    assert metrics(f"{others[0]}Y{END}")["new"] == 1
    assert metrics(f"{WRONG}Y{END}")["new"] == 0
    assert metrics(f"{RIGHT}Y{END}", prompt=1)["new"] == 1
    assert metrics(f"{RIGHT}Y{END}", prompt=1, version=1)["new"] == 1


def test_no_class_is_in_training_and_held_out() -> None:
    """The order of the numbers does not matter. About a tenth of the classes is held out."""
    rng = random.Random(3)
    classes = [
        Problem(numbers, target)
        for numbers in itertools.combinations_with_replacement(range(7), 4)
        for target in range(7)
    ]
    assert sum(problem.is_held_out for problem in classes) / len(classes) == pytest.approx(0.1, abs=0.02)
    for problem in classes:
        shuffled = tuple(rng.sample(problem.numbers, 4))
        assert Problem(shuffled, problem.target).is_held_out == problem.is_held_out
        assert Problem.from_prompt(problem.prompt) == problem
    assert not draw_problem(rng, held_out=False).is_held_out
    assert draw_problem(rng, held_out=True).is_held_out


def test_demonstrations_are_of_mixed_quality() -> None:
    rng = random.Random(4)
    right = wrong_claims = given_up = misses = repeats = retries = 0
    for _ in range(4000):
        problem = draw_problem(rng, held_out=False)
        response = demonstrate(problem, rng)
        attempts = attempts_of(response)
        assert 1 <= len(attempts) <= 5
        assert len(response) <= 70
        right += is_correct(problem, response + END)
        wrong_claims += response.endswith("Y") and not is_correct(problem, response + END)
        given_up += response.endswith("N")
        misses += response.count("N")
        retries += len(attempts) - 1
        repeats += sum(after == before for before, after in itertools.pairwise(attempts))
    assert right / 4000 == pytest.approx(0.51, abs=0.03)
    assert wrong_claims / 4000 == pytest.approx(0.08, abs=0.03)
    assert given_up / 4000 == pytest.approx(0.41, abs=0.03)
    assert given_up / misses == pytest.approx(0.41, abs=0.05)  # 0.35, and all that miss five times
    assert repeats / retries == pytest.approx(0.19, abs=0.04)  # 0.25 of those that are not planned


def test_files_are_the_same_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(countdown, "PROBLEMS", 50)
    monkeypatch.setattr(countdown, "HELD_OUT", 20)
    first, second = countdown.write_files(tmp_path / "a"), countdown.write_files(tmp_path / "b")
    assert [path.read_text() for path in first] == [path.read_text() for path in second]
    stamps = [path.stat().st_mtime_ns for path in first]
    assert [path.stat().st_mtime_ns for path in countdown.write_files(tmp_path / "a")] == stamps
