"""Responses to a benchmark are kept: an evaluation interrupted anywhere and restarted writes the same file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.rewards.scoring import Scorer
from megatron_aspo.tools.evaluation.benchmarks import select
from megatron_aspo.tools.evaluation.responses import Response, collect, problems_hash
from megatron_aspo.tools.evaluation.results import summarize

CONFIG = RunConfig("t")
SETTINGS = {"benchmark": "reasoning_gym:chain_sum", "checkpoint": "base", "samples": 3, "temperature": 0.8}
PROBLEMS_PER_CHUNK = 2


class Guesser:
    """An engine whose answers depend on the numbers of the prompt and the response: some right, some wrong."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, temperature: float, first_group: int = 0
    ) -> list[Sample]:
        assert temperature == SETTINGS["temperature"]
        self.asked.append(len(prompts))
        samples: list[Sample] = []
        for group, prompt in enumerate(prompts, first_group):
            for replica in range(responses_per_prompt):
                right = np.random.default_rng([prompt.id, replica]).random() < 0.5
                text = prompt.entry["answer"] if right else f"«{replica}»\n"
                samples.append(Sample(prompt, group, np.arange(len(text)), "stop", text=text))
        return samples

    def refit(self) -> None: ...

    def sleep(self) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def _a_world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def problems() -> dict[str, Prompt]:
    config = RunConfig("t", data=type(CONFIG.data)(eval_prompts=7, task="chain_sum", task_args={"max_digits": 1}))
    return select("reasoning_gym:chain_sum", config).problems(config, AsciiTokenizer())


def run(folder: Path, problems: dict[str, Prompt], **changed: Any) -> tuple[list[Response], list[int]]:
    engine = Guesser()
    settings = {**SETTINGS, **changed}
    with Scorer(CONFIG.data, CONFIG.reward, CONFIG.rollout) as scorer:
        return collect(folder, settings, problems, engine, scorer, PROBLEMS_PER_CHUNK), engine.asked


def test_every_response_is_kept_with_its_verdict(tmp_path: Path, problems: dict[str, Prompt]) -> None:
    responses, asked = run(tmp_path, problems)
    assert asked == [2, 2, 2, 1]
    assert [(r.problem, r.sample) for r in responses] == [(str(p), i) for p in range(1, 8) for i in range(3)]
    assert [r.score >= 1 for r in responses] == [r.text == problems[r.problem].entry["answer"] for r in responses]
    assert 3 < sum(r.score >= 1 for r in responses) < 18
    assert all(r.length == len(r.text) for r in responses)
    lines = (tmp_path / "responses.jsonl").read_text().splitlines()
    assert [Response(**json.loads(line)) for line in lines] == responses
    assert run(tmp_path, problems) == (responses, [])  # nothing is left to do


def test_ended_anywhere_it_goes_on_to_the_same_file(tmp_path: Path, problems: dict[str, Prompt]) -> None:
    responses, _ = run(tmp_path / "whole", problems)
    whole = (tmp_path / "whole" / "responses.jsonl").read_bytes()
    settings = (tmp_path / "whole" / "settings.json").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {0: 0, 1: 0, ends[5] - 1: 1, ends[5]: 2, ends[5] + 1: 2, ends[11]: 4, ends[16]: 5, ends[19]: 6}
    for cut, kept in (cuts | {len(whole) - 1: 6, len(whole): 7}).items():
        folder = tmp_path / f"cut at {cut}"
        folder.mkdir()
        (folder / "settings.json").write_bytes(settings)
        (folder / "responses.jsonl").write_bytes(whole[:cut])
        again, asked = run(folder, problems)
        assert sum(asked) == 7 - kept
        assert again == responses
        assert (folder / "responses.jsonl").read_bytes() == whole


def test_folders_that_are_refused(tmp_path: Path, problems: dict[str, Prompt]) -> None:
    run(tmp_path, problems)
    before = (tmp_path / "responses.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"samples=3 .* 4 .*, seed=None .* 2 .*--out"):
        run(tmp_path, problems, samples=4, seed=2)
    assert (tmp_path / "responses.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"responses.jsonl/x: .*Not a directory.*--out"):
        run(tmp_path / "responses.jsonl" / "x", problems)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match="--out"):
        run(tmp_path, problems)


def test_two_evaluations_at_once(tmp_path: Path, problems: dict[str, Prompt]) -> None:
    class Second(Guesser):
        def generate(self, prompts: Sequence[Prompt], *arguments: Any, **options: Any) -> list[Sample]:
            if not self.asked:
                run(tmp_path, problems)
            return super().generate(prompts, *arguments, **options)

    with Scorer(CONFIG.data, CONFIG.reward, CONFIG.rollout) as scorer, pytest.raises(RunError, match="another process"):
        collect(tmp_path, SETTINGS, problems, Second(), scorer, PROBLEMS_PER_CHUNK)


def test_responses_without_a_verdict(tmp_path: Path, problems: dict[str, Prompt]) -> None:
    """They are kept with the reason; too many of them end the evaluation before its chunk is kept."""

    class Silent(Scorer):
        def __init__(self, config: RunConfig, every: int) -> None:
            super().__init__(config.data, config.reward, config.rollout)
            self.every = every

        def score(self, samples: Sequence[Sample]) -> None:
            super().score(samples)
            for sample in samples[:: self.every]:
                sample.score, sample.unjudged = 0.0, "timed out"

    with Silent(CONFIG, 1) as scorer, pytest.raises(RunError, match=r"timed out.*max_unjudged"):
        collect(tmp_path, SETTINGS, problems, Guesser(), scorer, PROBLEMS_PER_CHUNK)
    assert (tmp_path / "responses.jsonl").read_bytes() == b""
    with Silent(CONFIG, 3) as scorer:
        responses = collect(tmp_path, SETTINGS, problems, Guesser(), scorer, PROBLEMS_PER_CHUNK)
    assert [r.unjudged for r in responses] == ["timed out", "", ""] * 7
    assert run(tmp_path, problems) == (responses, [])
    results = summarize(SETTINGS, responses)
    assert results.unjudged == pytest.approx(1 / 3)
    assert results.pass_at.keys() == {1, 2}  # no problem has three verdicts
    right = [r.score >= 1 for r in responses if not r.unjudged]
    assert results.pass_at[1].value == pytest.approx(sum(right) / 14)


def test_the_hash_sees_question_answer_and_order(problems: dict[str, Prompt]) -> None:
    prompt, rest = problems["1"], dict(list(problems.items())[1:])
    others: list[dict[str, Prompt]] = [
        dict(reversed(problems.items())),
        rest,
        {"x": prompt} | rest,
        {"1": replace(prompt, token_ids=(1, 2))} | rest,
        {"1": replace(prompt, entry={"answer": "x"})} | rest,
    ]
    assert len({problems_hash(p) for p in [problems, *others]}) == 6
    assert problems_hash(dict(problems)) == problems_hash(problems)
