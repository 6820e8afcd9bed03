"""Responses of several turns: gradients against a float64 oracle; what verifiers and metrics see."""

import math
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from sokoban_rules import Board

from megatron_aspo.batch import OBSERVATION, Prompt, Sample
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.rewards import RewardConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.errors import RunError
from megatron_aspo.loss import PolicyLossConfig, megatron_loss_func
from megatron_aspo.policy.packing import pack, unpack
from megatron_aspo.policy.sample_log import spans, token_columns
from megatron_aspo.ranks.exchange import array_bytes, pack_arrays, unpack_arrays, without_arrays
from megatron_aspo.rewards.programs.verifier import CodeVerifier
from megatron_aspo.rewards.scoring import Scorer
from megatron_aspo.rewards.verdict import Verdict
from megatron_aspo.rollout.engine import NOTHING, Request, Response
from megatron_aspo.rollout.environments import PythonTool, open_environment
from megatron_aspo.rollout.metrics import sample_metrics
from megatron_aspo.rollout.table import from_table, to_table
from megatron_aspo.rollout.turns import TOO_SLOW, Turns

VOCAB = 23
PROMPT = Prompt(5, "12", (1, 2), {"answer": "7"})


def two_turns(advantage: float, seed: int) -> Sample:
    """Three tokens of the policy, two of the environment, two of the policy."""
    rng = np.random.default_rng(seed)
    versions = np.array([4, 4, 5, OBSERVATION, OBSERVATION, 5, 5], np.int32)
    logprobs = np.where(versions < 0, 0, rng.normal(-3, 1, 7)).astype(np.float32)
    tokens = rng.integers(VOCAB, size=7).astype(np.int32)
    return Sample(PROMPT, 0, tokens, "stop", 4, logprobs, advantage=advantage, versions=versions)


@pytest.mark.parametrize("context", [1, 2])
def test_the_gradient_of_an_observation_is_zero(context: int) -> None:
    """ASPO with ratios in every region of its clips, against its formula in float64 for tokens of the policy."""
    samples = [two_turns(1.5, 1), two_turns(-0.5, 2)]
    config = PolicyLossConfig(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    count = 10  # tokens of the policy
    seen = 0
    for rank in range(context):
        (batch,) = pack(
            samples, dp_rank=0, dp_size=1, max_tokens=64, multiple=4 if context > 1 else 1,
            context_rank=rank, context_size=context,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(rank)
        logits = torch.randn(len(batch.labels), VOCAB, generator=generator, dtype=torch.float64, requires_grad=True)
        logprobs = torch.log_softmax(logits.detach(), -1).gather(1, batch.labels[:, None])[:, 0]
        old = logprobs - torch.randn(len(logprobs), generator=generator, dtype=torch.float64)
        loss, denominator, _ = megatron_loss_func(
            logits,
            targets=batch.labels,
            old_logprobs=old,
            advantages=batch.advantages.double(),
            loss_mask=batch.loss_mask,
            config=config,
            tp_group=None,
        )
        loss.backward()
        expected = torch.zeros_like(logits)
        for t in range(len(batch.labels)):
            segment, place = int(batch.sequence_ids[t]), int(batch.position_ids[t]) - 1  # of the label in the response
            if segment >= 2 or not 0 <= place < 7 or place in (3, 4):
                continue
            assert int(batch.labels[t]) == samples[batch.samples[segment]].token_ids[place]
            advantage, r = samples[batch.samples[segment]].advantage, math.exp(float(logprobs[t] - old[t]))
            weight = min(1 / r, 3.0) * (r <= 1.2) if advantage > 0 else min(r, 3.0) * (r >= 0.8)
            expected[t] = advantage * weight * torch.softmax(logits.detach()[t], -1)
            expected[t, batch.labels[t]] -= advantage * weight
            seen += 1
        assert logits.grad is not None
        assert torch.equal(logits.grad[~batch.loss_mask], torch.zeros_like(logits.grad[~batch.loss_mask]))
        torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-12)
        assert int(denominator) == int(batch.loss_mask.sum())
    assert seen == count


def test_two_turns_are_one_turn_with_their_mask() -> None:
    """Only the mask tells a response of two turns from one with the same tokens."""
    turns = two_turns(1.5, 1)
    whole = Sample(PROMPT, 0, turns.token_ids, "stop", 4, turns.rollout_logprobs, advantage=1.5)
    (a,), (b,) = (pack([sample], dp_rank=0, dp_size=1, max_tokens=64) for sample in (turns, whole))
    assert a.loss_mask.tolist() == [False, True, True, True, False, False, True, True, False]
    assert b.loss_mask.tolist() == [False, *[True] * 7, False]
    for name in ("tokens", "labels", "position_ids", "sequence_ids", "advantages", "rollout_logprobs", "cu_seqlens"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    table = unpack([turns], [a], [torch.arange(1.0, 10.0)])
    assert table.tolist() == [[2.0, 3.0, 4.0, 0.0, 0.0, 7.0, 8.0]]


def test_numbers_of_a_sample_and_its_way_to_other_ranks() -> None:
    sample = two_turns(1.5, 1)
    sample.environment_score = 0.75
    assert (sample.response_length, sample.written_length, sample.turns) == (7, 5, 2)
    assert sample.written.tolist() == [*sample.token_ids[:3], *sample.token_ids[5:]]
    assert spans(sample) == [[4, 2], [5, 1], [OBSERVATION, 2], [5, 2]]
    (there,) = from_table(to_table([sample]), {5: PROMPT})
    for name in ("response_length", "written_length", "turns", "environment_score"):
        assert getattr(there, name) == getattr(sample, name), name
    buffer = pack_arrays([sample])
    assert len(buffer) == array_bytes(there)
    (back,) = unpack_arrays([there], buffer)
    assert back.versions is not None
    assert back.versions.tolist() == [4, 4, 5, -1, -1, 5, 5]
    assert without_arrays(sample).turns == 2
    plain = Sample(PROMPT, 0, np.arange(3, dtype=np.int32), "stop")
    assert (plain.written_length, plain.turns) == (3, 1)
    metrics = sample_metrics([sample, plain], "rollout")
    assert (metrics["rollout/response_length"], metrics["rollout/turns"]) == (4.0, 1.5)
    assert "rollout/turns" not in sample_metrics([plain], "rollout")


def test_turns_of_a_response() -> None:
    sample = two_turns(0, 1)
    assert sample.rollout_logprobs is not None
    assert sample.versions is not None
    response = Response(sample.token_ids, sample.rollout_logprobs, sample.versions)
    assert [turn.tolist() for turn in response.turns] == [sample.token_ids[:3].tolist(), sample.token_ids[5:].tolist()]
    request = Request(0, PROMPT, 0, 0, response)
    assert request.turn == 5  # a stop string in an observation does not end the next turn
    assert Request(0, PROMPT, 0, 0).turn == 0
    assert [turn.tolist() for turn in NOTHING.turns] == [[]]
    assert replace(response, finish_reason="stop").sample(PROMPT, 0, "").weight_version == 4


def test_the_loss_of_the_log_leaves_observations_out() -> None:
    """The ratio of the response (GSPO) is the mean of the policy's tokens alone."""
    sample = two_turns(1.5, 1)
    old, new = torch.zeros(1, 7), torch.tensor([[0.1, 0.2, 0.3, 50.0, -50.0, 0.4, 0.5]])
    loss = PolicyLossConfig(objective="gspo", clip_high=10.0, clip_low=0.9, aggregation="seq-mean-token-mean")
    columns = token_columns([sample], torch.stack([old, new, torch.ones(1, 7)]), loss)
    assert columns["weight"][0, [0, 1, 2, 5, 6]].tolist() == pytest.approx([math.exp(0.3)] * 5, rel=1e-6)


class Reader:
    """A verifier that notes the texts."""

    texts: list[str]

    def __init__(self) -> None:
        self.texts = []

    def submit(self, sample: Sample) -> Future[Verdict]:
        self.texts.append(sample.text)
        verdict: Future[Verdict] = Future()
        verdict.set_result(Verdict(0.25, ""))
        return verdict

    def close(self) -> None: ...


def test_an_environments_score_takes_the_verifiers_place(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [two_turns(0, seed) for seed in range(4)]
    samples[1].environment_score, samples[2].environment_score = 0.5, math.inf
    for i, sample in enumerate(samples):
        sample.text = f"text {i}"
    rollout = RolloutConfig(max_response_tokens=8, environment="python", environment_seconds=7.0)
    with Scorer(DataConfig(), RewardConfig(), rollout, reader := Reader()) as scorer:
        scorer.score(samples)
    assert reader.texts == ["text 0", "text 3"]
    assert [sample.score for sample in samples] == [0.25, 0.5, 0.0, 0.25]
    slow = "the environment took more than rollout.environment_seconds=7"
    assert [sample.unjudged for sample in samples] == ["", "", slow, ""]
    assert capsys.readouterr().err == f"warning: 1 of 4 responses could not be judged: {slow}\n"


class Scripted:
    """An engine whose policy writes "a" in each turn, after `seconds`."""

    replica, writers, tokenizer = 0, ((0,),), AsciiTokenizer()

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def advance(self, requests: Sequence[Request], temperature: float, enough: Any = None) -> list[Response]:
        time.sleep(self._seconds)
        a = Response(np.array([97], np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32), finish_reason="stop")
        return [a.after(request.prefix) for request in requests]


def turns_of(environment: Any, sampling: float = 0.0, **settings: Any) -> Turns:
    """Turns with two threads."""
    names = {"environment": "test_turns:Mute", "max_response_tokens": 64, "max_turns": 3}
    return Turns(Scripted(sampling), RolloutConfig(**names | settings), environment, 2)


def play(turns: Turns, *ids: int) -> list[Response]:
    return turns.advance([Request(i, replace(PROMPT, id=n), 0, 0) for i, n in enumerate(ids)], 1.0)


class Counting:
    """Counts its turns, in its score, and says "more"."""

    def reset(self, prompt: Prompt) -> None:
        self.prompt, self.score = prompt, 0.0

    def step(self, response: str) -> str | None:
        self.score += 0.25
        return "more"


def test_sampling_takes_nothing_of_an_environments_seconds() -> None:
    turns = turns_of(Counting, sampling=1.1, environment_seconds=1.0)
    assert [response.score for response in play(turns, *range(8))] == [0.75] * 8


def test_turns_that_a_resumed_run_repeats_have_seconds_of_their_own() -> None:
    class Slow(Counting):
        def step(self, response: str) -> str | None:
            time.sleep(0.5)
            return super().step(response)

    def after_two_turns(ended: Any) -> bool:
        calls.append(1)
        return len(calls) > 2

    calls, settings = list[int](), {"environment_seconds": 1.0}
    request = Request(0, PROMPT, 0, 0)
    (half,) = turns_of(Slow, **settings).advance([request], 1.0, after_two_turns)
    assert (half.finish_reason, len(half.turns)) == (None, 2)
    (resumed,) = turns_of(Slow, **settings).advance([replace(request, prefix=half)], 1.0)
    assert resumed.score == 0.75


@pytest.mark.parametrize(("limit", "count"), [(5, 1), (10, 2), (64, 3)])
def test_every_response_has_an_environment_of_its_own(limit: int, count: int) -> None:
    """Also one whose predecessor of the same prompt had no room left, as in each evaluation."""
    turns = turns_of(Counting, max_response_tokens=limit)
    for _ in range(3):
        responses = play(turns, -1, 4)
        assert [response.score for response in responses] == [count / 4] * 2
        assert {response.finish_reason for response in responses} == {"stop" if limit == 64 else "length"}


def test_tools_that_hang_block_neither_the_others_nor_later_turns() -> None:
    release = threading.Event()

    class Hanging(Counting):
        def step(self, response: str) -> str | None:
            if self.prompt.id < 3:
                release.wait()
            return super().step(response)

    turns = turns_of(Hanging, environment_seconds=0.5)
    try:
        for _ in range(2):
            scores = [response.score for response in play(turns, 0, 1, 2, 3, 4)]
            assert scores == [TOO_SLOW] * 3 + [0.75] * 2
    finally:
        release.set()


def test_an_environments_faults(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that is away leaves a response without a verdict; any other exception ends the run."""

    class Away(Counting):
        fault: Exception = ConnectionRefusedError("no server")

        def step(self, response: str) -> str | None:
            if self.prompt.id == 1:
                raise self.fault
            return super().step(response)

    responses = play(turns_of(Away), 0, 1, 2)
    line = "rollout.environment=test_turns:Mute failed for prompt 1: ConnectionRefusedError: no server"
    assert capsys.readouterr().err == f"warning: {line}\n"
    samples = [response.sample(PROMPT, 0, "") for response in responses]
    with Scorer(DataConfig(), RewardConfig(), RolloutConfig(environment="python"), Reader()) as scorer:
        scorer.score(samples)
    fault = "the environment raised an OSError"
    assert [(sample.score, sample.unjudged) for sample in samples] == [(0.75, ""), (0.0, fault), (0.75, "")]
    Away.fault = TimeoutError("read timed out")  # its own, not that of rollout.environment_seconds
    assert [response.score == -math.inf for response in play(turns_of(Away), 0, 1, 2)] == [False, True, False]
    Away.fault = KeyError("no such tool")
    with pytest.raises(
        RunError, match=r"^rollout\.environment=test_turns:Mute failed for prompt 1: KeyError: 'no such"
    ):
        play(turns_of(Away), 0, 1, 2)


@pytest.mark.parametrize(
    ("said", "score", "fault"),
    [("", 0.5, "an observation must have a token"), (None, math.nan, "score=nan is not finite")],
)
def test_answers_that_end_the_run(said: str | None, score: float, fault: str) -> None:
    class Answering(Counting):
        def step(self, response: str) -> str | None:
            self.score = score
            return said

    line = f"rollout.environment=test_turns:Mute failed for prompt 1: ValueError: {fault}"
    with pytest.raises(RunError, match=f"^{re.escape(line)}$"):
        play(turns_of(Answering), 1)


def test_the_length_penalty_is_of_what_the_policy_wrote() -> None:
    sample = two_turns(0, 1)  # 5 of 7 tokens
    config = RewardConfig(overlong_buffer=4)
    with Scorer(DataConfig(), config, RolloutConfig(max_response_tokens=8), Reader()) as scorer:
        scorer.score([sample])
    assert sample.reward == 0.25 - 0.25


@pytest.mark.engines
def test_the_python_tool() -> None:
    with CodeVerifier(RewardConfig().code) as verifier:
        tool = PythonTool(verifier)
        assert tool.step("I compute.\n```python\nprint(6 * 7)\n```") == "\n```output\n42\n```\n"
        assert tool.step("<think>wait\n```python\nimport math\nprint(math.factorial(5))\n1 / 0\n```\n") == (
            "\n```output\n120\nZeroDivisionError: division by zero\n```\n"
        )
        assert tool.step("```python\nprint(open('/etc/passwd').read())\n```") == (
            "\n```output\nFileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd'\n```\n"
        )
        assert tool.step("The answer is \\boxed{42}") is None
        long = tool.step("```python\nprint('a' * 5000 + 'b' * 7000)\n1 / 0\n```")
        assert long == (
            f"\n```output\n{'a' * 2048}\n[... 7940 characters ...]\n{'b' * 2012}\n"
            "ZeroDivisionError: division by zero\n```\n"
        )


@pytest.mark.engines
def test_a_sandbox_that_fails_leaves_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    with CodeVerifier(RewardConfig().code) as verifier:
        turns = turns_of(partial(PythonTool, verifier), max_turns=2)
        monkeypatch.setattr(Scripted, "tokenizer", Program())
        assert [response.score for response in play(turns, 0)] == [None]
        monkeypatch.setenv("PATH", "")  # no bubblewrap
        assert [response.score for response in play(turns, 0)] == [-math.inf]


class Program(AsciiTokenizer):
    """Reads every turn as a program."""

    def decode(self, token_ids: Any, special: bool = False) -> str:
        return "```python\nprint(1)\n```"


def test_further_tries_at_a_task() -> None:
    import reasoning_gym

    make, _ = open_environment("retry", RewardConfig())
    game = make()
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=1)[0]
    game.reset(Prompt(0, "", (), entry))
    assert (game.step("no number"), game.score < 1) == ("wrong, again: ", True)
    assert (game.step(f" {entry['answer']}\n"), game.score) == (None, 1.0)


@pytest.mark.parametrize("boxes", [1, 3])
def test_boards_of_sokoban_after_every_turn(boxes: int) -> None:
    """Random games and the task's own solutions, in turns of up to four moves, against the rules."""
    import reasoning_gym

    make, _ = open_environment("sokoban", RewardConfig())
    small = {"min_w": 6, "max_w": 7, "min_h": 6, "max_h": 6, "min_boxes": boxes, "max_boxes": boxes}
    task, draw, scores, pushes = reasoning_gym.create_dataset("sokoban", seed=3, size=24, **small), Random(5), [], 0
    for entry in task:
        for solve in (False, True):
            game, board = make(), Board(entry["metadata"]["gamestr"])
            game.reset(Prompt(0, "", (), entry))
            assert game.score == 0
            moves = entry["answer"] if solve else "".join(draw.choices("LDUR", k=20))
            while moves:
                length = draw.randint(1, 4)
                word, moves, before = moves[:length], moves[length:], board.boxes
                board.move(word)
                pushes += board.boxes != before
                said = game.step(draw.choice(["{}", "<think>UP or L?</think>Not RR.\n {}\n", "I go {}. "]).format(word))
                assert (said, game.score) == (None if board.solved else str(board), float(board.solved))
                if said is None:
                    break
            assert game.score == 1 or not solve
            scores.append(game.score)
    assert pushes > 50
    assert 24 <= sum(scores) < 48


def test_a_turn_without_a_move_ends_the_game() -> None:
    board = "\n+ + + + +\n+ - * - +\n+ - @ - +\n+ - X - +\n+ + + + +\n"
    entry = {"answer": "D", "metadata": {"source_dataset": "sokoban", "gamestr": board}}
    make, _ = open_environment("sokoban", RewardConfig())
    for turn in ("", "I give up", "UP", "D\nor not", "<think>D", "d"):
        game = make()
        game.reset(Prompt(0, "", (), entry))
        assert game.step("L R") == board
        assert (game.step(turn), game.score) == (None, 0.0), turn
    game = make()
    game.reset(Prompt(0, "", (), entry))
    assert (game.step("D"), game.score) == (None, 1.0)
