"""The stream of training prompts and the held-out set, over the real reasoning-gym."""

from typing import Any

import pytest

from megatron_aspo.config import DataConfig
from megatron_aspo.data import Problem, PromptStream
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.reasoning_gym import judge
from megatron_aspo.tokenizer import AsciiTokenizer

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


def test_pieces_are_the_whole_and_a_position_resumes() -> None:
    whole = prompts_of().draw(12)
    source = prompts_of()
    start = source.draw(5)
    state = source.state_dict()
    assert start + source.draw(7) == whole
    resumed = prompts_of()
    resumed.load_state_dict(state)
    assert resumed.draw(7) == whole[5:]


def test_held_out_problems_never_occur_in_training() -> None:
    """A good part of all one-digit sums is held out; a thousand draws hit the other ones alone."""
    source = prompts_of(task_args=ONE_DIGIT, eval_prompts=40)
    held_out = {p.text for p in source.held_out}
    drawn = source.draw(1000)
    assert len(drawn) == 1000
    assert held_out.isdisjoint(p.text for p in drawn)
    assert source.positions[0] > 1000  # some were skipped
    assert [p.id for p in source.held_out] == [-1 - i for i in range(40)]


class Letters:
    """Problem `seed + position` of the alphabet, over and over."""

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
    with pytest.raises(UserError, match="a prompt of the prompts that were passed has 4 tokens, 3 fit beside"):
        PromptStream(config, AsciiTokenizer(), 3, Letters)


def test_nothing_outside_the_held_out_set() -> None:
    source = prompts_of(task="chain_sum", task_args=ONE_DIGIT, eval_prompts=3000)
    with pytest.raises(
        UserError, match=r"no problem outside the held-out set; lower data\.eval_prompts=3000, or widen"
    ):
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
    seen = [again._next() for _ in range(source.positions[0])]
    assert source.overlong == sum(len(p.token_ids) > 9 for p in seen) > 10
    # So are the held-out ones, and the next ones take their place.
    assert len(source.held_out) == 32
    expected = [p for p in prompts_of(64, task_args=MIXED, eval_prompts=200).held_out if len(p.token_ids) <= 9][:32]
    assert source.held_out == expected
    assert source.held_out_overlong == -expected[-1].id - 32 > 5


def test_a_position_resumes_to_the_sample_where_some_are_left_out() -> None:
    whole = filtered()
    expected = whole.draw(60)
    source = filtered()
    start = source.draw(23)
    resumed = filtered()
    resumed.load_state_dict(source.state_dict())
    assert resumed.overlong == source.overlong > 0
    assert start + resumed.draw(37) == expected
    assert resumed.state_dict() == whole.state_dict()


def test_when_none_is_left_to_train_on() -> None:
    source = filtered()
    source.max_prompt_tokens = 6
    with pytest.raises(UserError, match=r"of 1000 problems in a row 1000 have more than the 6 tokens"):
        source.draw(1)


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
    ("fields", "message"),
    [
        ({"task": "chain_sums"}, "no task 'chain_sums'"),
        ({"task_args": {"min_term": 2}}, r"data\.task_args do not fit reasoning-gym's chain_sum: .*min_term"),
        ({"task_args": {"min_terms": 5, "max_terms": 2}}, r"data\.task_args do not fit"),
        ({"task_args": {"seed": 3}}, r"data\.task_args do not fit"),
        ({"prompt_template": "{expresion}"}, r"data\.prompt_template: KeyError 'expresion'; .*expression"),
        ({"prompt_template": "{"}, r"data\.prompt_template: ValueError"),
        ({"prompt_template": "{}"}, r"data\.prompt_template: IndexError"),
        ({"prompt_template": "{question.foo}"}, r"data\.prompt_template: AttributeError"),
        ({"prompt_template": "{question[a]}"}, r"data\.prompt_template: TypeError"),
        ({"prompt_template": "{question} →"}, "knows ASCII only"),
        ({"max_tokens": 4}, r"tokens, 4 fit beside the response; raise model\.max_sequence_length, or .*=filter"),
        (
            {"max_tokens": 4, "overlong_prompts": "filter"},
            r"filter leaves nothing of .*: of 1000 problems in a row 1000 have more than the 4 tokens that fit",
        ),
    ],
)
def test_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prompts_of(**fields)
