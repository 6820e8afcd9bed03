"""Demonstrations of the warm-up, and its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_aspo.batch import Prompt
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import WarmupConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.errors import UserError
from megatron_aspo.policy.warmup import cache_path, make_demonstrations


def demonstrated(answers: list[Any], wrong_fraction: float) -> list[str]:
    prompts = [Prompt(i, "?", (63,), {} if a is None else {"answer": a}) for i, a in enumerate(answers)]
    tokenizer = AsciiTokenizer()
    samples = make_demonstrations(prompts, tokenizer, wrong_fraction, np.random.default_rng(0))
    return [tokenizer.decode(sample.token_ids) for sample in samples]


def test_of_several_accepted_answers_the_first_is_demonstrated() -> None:
    assert demonstrated([["34", "thirty-four"], "x", 5], wrong_fraction=0) == ["34", "x", "5"]
    slipped, next_one, digit = demonstrated([["34", "thirty-four"], "x", 5], wrong_fraction=1)
    assert sum(a != b for a, b in zip(slipped, "34", strict=True)) == 1
    assert next_one == "5"
    assert digit != "5"


def test_a_problem_without_an_answer_is_named() -> None:
    with pytest.raises(UserError, match=r"'\?' has no answer to demonstrate; .* or set warmup\.updates=0"):
        demonstrated([None], wrong_fraction=0)


def test_other_files_under_the_same_name_are_another_warm_up(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    config = RunConfig("t", data=DataConfig(path=str(file)))
    paths: list[Path] = []
    for text in ("1", "1", "22"):
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        paths.append(cache_path(config))
    assert paths[0] == paths[1] != paths[2]


def test_runs_of_several_seeds_share_a_warm_start() -> None:
    def path(seed: int, data_seed: int, warmup_seed: int | None) -> Path:
        warmup = WarmupConfig(updates=1, seed=warmup_seed)
        return cache_path(RunConfig("t", seed=seed, data=DataConfig(seed=data_seed), warmup=warmup))

    assert path(1, 2, 5) == path(3, 4, 5) != path(1, 2, 6)
    assert len({path(1, 2, None), path(3, 2, None), path(1, 4, None)}) == 3
    assert RunConfig("t", seed=3, warmup=WarmupConfig(seed=5)).init_seed == 5
    assert RunConfig("t", seed=3).init_seed == 3
