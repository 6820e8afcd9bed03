"""The stream of training prompts and the held-out set, over the real reasoning-gym; the character tokenizer."""

import os
import random
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_aspo.config.data import DataConfig, SourceConfig
from megatron_aspo.data import Problem, PromptStream
from megatron_aspo.data.tasks import TaskSource
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.reasoning_gym import judge

ROOT = Path(__file__).parents[2]
TWO_DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
ONE_DIGIT = {**TWO_DIGITS, "min_digits": 1, "max_digits": 1}


def prompts_of(max_tokens: int = 64, **fields: Any) -> PromptStream:
    fields = {"task_args": TWO_DIGITS, "prompt_template": "{expression} =", "eval_prompts": 32, **fields}
    return PromptStream(DataConfig(**fields), AsciiTokenizer(), max_tokens)


def test_the_stream_is_the_seeds() -> None:
    first, again, other = (prompts_of(seed=seed) for seed in (0, 0, 5))
    drawn = first.draw(20)
    assert drawn == again.draw(20)
    assert drawn != other.draw(20)
    assert first.held_out == again.held_out == other.held_out
    assert first.draw(5) != drawn[:5]
    assert len({p.id for p in drawn + first.held_out}) == 20 + 32


def test_task_that_draws_from_the_module_random_has_one_problem_for_a_position() -> None:
    """reasoning-gym's list_functions does; the state of the module is left alone."""
    config = SourceConfig(task="list_functions")
    first = [TaskSource(config, 3).problem(i).content for i in range(5)]
    random.seed(7)
    state = random.getstate()
    assert [TaskSource(config, 3).problem(i).content for i in range(5)] == first
    assert random.getstate() == state
    assert len(set(first)) == 5


SHOW = """
import sys
from megatron_aspo.config.data import SourceConfig
from megatron_aspo.data.tasks import TaskSource
source = TaskSource(SourceConfig(task=sys.argv[1]), 1)
print([source.problem(i).content for i in range(8)])
"""
RUN = "import sys; from megatron_aspo.ranks.launch import run_local; sys.exit(run_local('show', sys.argv[1:], 2))"


@pytest.mark.parametrize("task", ["isomorphic_strings", "ransom_note", "list_functions", "zebra_puzzles"])
def test_ranks_and_resumed_runs_have_the_same_problems(task: str, tmp_path: Path) -> None:
    """Some tasks draw from sets, whose order follows the hash seed that `run_local` fixes."""
    (tmp_path / "show.py").write_text(SHOW)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-c", RUN, task]
    shown = [subprocess.run(command, env=environment, check=True, capture_output=True, text=True) for _ in range(2)]
    lines = [line for done in shown for line in done.stdout.splitlines()]
    assert len(lines) == 4
    assert len(set(lines)) == 1


def test_held_out_problems_never_occur_in_training() -> None:
    """A good part of all one-digit sums is held out; a thousand draws hit only the others."""
    source = prompts_of(task_args=ONE_DIGIT, eval_prompts=40)
    held_out = {p.text for p in source.held_out}
    drawn = source.draw(1000)
    assert len(drawn) == 1000
    assert held_out.isdisjoint(p.text for p in drawn)
    assert source.state_dict()["positions"][0] > 1000  # some were skipped
    assert [p.id for p in source.held_out] == [-1 - i for i in range(40)]


class Letters:
    """A source of the letters of the alphabet, cyclic; row i is letter `seed + position`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def problem(self, position: int) -> Problem:
        number = (self.seed + position) % 26
        return Problem(chr(ord("a") + number), {"number": number}, {"answer": number}, "letters")


def test_a_source_of_the_callers_own() -> None:
    config = DataConfig(seed=1, eval_seed=3, eval_prompts=4, prompt_template="{number}: {prompt}")
    stream = PromptStream(config, AsciiTokenizer(), 20, Letters)
    assert [p.text for p in stream.held_out] == ["3: d", "4: e", "5: f", "6: g"]
    drawn = stream.draw(23)  # all but the held-out ones, and one again
    assert [p.text[-1] for p in drawn] == [*"bchijklmnopqrstuvwxyza", "b"]
    assert {(p.verifier, p.data_source) for p in drawn} == {("math", "letters")}
    assert drawn[0].entry == {"answer": 1}
    resumed = PromptStream(config, AsciiTokenizer(), 20, Letters)
    resumed.load_state_dict(stream.state_dict())
    assert [p.text[-1] for p in resumed.draw(2)] == ["c", "h"]
    with pytest.raises(UserError, match="passed has 4 tokens, 3 fit"):
        PromptStream(config, AsciiTokenizer(), 3, Letters)


def test_a_source_without_problems() -> None:
    class Nothing(Letters):
        def __len__(self) -> int:
            return 0

    config = DataConfig(eval_prompts=4, prompt_template="{prompt}")
    with pytest.raises(UserError, match="has no problems"):
        PromptStream(config, AsciiTokenizer(), 20, Nothing)


def test_nothing_outside_the_held_out_set() -> None:
    source = prompts_of(task="chain_sum", task_args=ONE_DIGIT, eval_prompts=3000)
    with pytest.raises(UserError, match=r"1000 are held out; lower data\.eval_prompts=3000"):
        source.draw(2000)


# Problems of 7, 9 and 11 characters.
MIXED = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 3}


def filtered(max_tokens: int = 9, **fields: Any) -> PromptStream:
    return prompts_of(max_tokens, task_args=MIXED, overlong_prompts="filter", **fields)


def test_overlong_prompts_are_left_out_and_counted() -> None:
    every, source = prompts_of(64, task_args=MIXED), filtered()
    drawn = source.draw(100)
    assert max(len(p.token_ids) for p in drawn) == 9
    looked_at = every.draw(400)
    held_out = {p.text for p in source.held_out}
    fitting = [p for p in looked_at if len(p.token_ids) <= 9 and p.text not in held_out]
    assert [p.id for p in drawn] == [p.id for p in fitting[:100]]
    again = prompts_of(64, task_args=MIXED)
    seen = [again._training.next(AsciiTokenizer()) for _ in range(source.state_dict()["positions"][0])]
    assert source.overlong == sum(len(p.token_ids) > 9 for p in seen if p) > 10
    # Overlong held-out prompts are replaced by the next ones.
    assert len(source.held_out) == 32
    expected = [p for p in prompts_of(64, task_args=MIXED, eval_prompts=200).held_out if len(p.token_ids) <= 9][:32]
    assert source.held_out == expected
    assert source.held_out_overlong == -expected[-1].id - 32 > 5


@pytest.mark.parametrize("make", [prompts_of, filtered])
def test_a_position_resumes_to_the_sample(make: Callable[[], PromptStream]) -> None:
    whole, source, resumed = make(), make(), make()
    expected = whole.draw(60)
    start = source.draw(23)
    resumed.load_state_dict(source.state_dict())
    assert (resumed.overlong == source.overlong > 0) is (make is filtered)
    assert start + resumed.draw(37) == expected
    assert resumed.state_dict() == whole.state_dict()


def test_a_right_answer_scores_one() -> None:
    source = prompts_of()
    tokenizer = AsciiTokenizer()
    for prompt in source.draw(10):
        a, operator, b = prompt.text.removesuffix(" =").split()
        assert tokenizer.decode(prompt.token_ids) == prompt.text
        answer = int(a) + int(b) if operator == "+" else int(a) - int(b)
        assert prompt.entry["answer"] == str(answer)
        texts = [f" {answer}\n", str(answer + 1), "", f"it is {answer}"]
        right, *wrong = (judge(text, prompt.entry) for text in texts)
        assert right == 1
        assert max(wrong) < 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"task": "chain_sums"}, "'chain_sums'"),
        ({"task_args": {"min_term": 2}}, r"data\.task_args .*chain_sum: .*min_term"),
        ({"task_args": {"min_terms": 5, "max_terms": 2}}, r"data\.task_args"),
        ({"task_args": {"seed": 3}}, r"data\.task_args"),
        ({"prompt_template": "{expresion}"}, r"data\.prompt_template: KeyError 'expresion'; .*expression"),
        ({"prompt_template": "{"}, r"data\.prompt_template: ValueError"),
        ({"prompt_template": "{}"}, r"data\.prompt_template: IndexError"),
        ({"prompt_template": "{question.foo}"}, r"data\.prompt_template: AttributeError"),
        ({"prompt_template": "{question[a]}"}, r"data\.prompt_template: TypeError"),
        ({"prompt_template": "{question} →"}, r"'→'.*model\.hf_path"),
        ({"max_tokens": 4}, r"4 fit .*model\.max_sequence_length, or .*=filter"),
        ({"max_tokens": 4, "overlong_prompts": "filter"}, r"1000 have more than the 4 tokens .*=filter"),
    ],
)
def test_refuses(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        prompts_of(**fields)


@pytest.mark.parametrize("text", ["", "12 + 34 =", "two\nlines\t", string.printable[:95]])
def test_characters_round_trip(text: str) -> None:
    tokenizer = AsciiTokenizer()
    ids = tokenizer.encode(text)
    assert ids == tuple(map(ord, text))
    assert tokenizer.decode(ids) == text
    # Control characters are not text.
    assert tokenizer.decode((tokenizer.pad_id, *ids, tokenizer.eos_id, 127, 13)) == text
    assert max((127, *ids)) < tokenizer.vocab_size
