"""Order of the training loop around checkpoints: the engine sleeps, records precede the save, times belong to their
step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ranks import run, tiny_run

from megatron_aspo.commands import train
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import CheckpointConfig, EvalConfig, TrainConfig
from megatron_aspo.journal.log import read_metrics
from megatron_aspo.policy import checkpoint
from megatron_aspo.rollout.megatron import EmbeddedEngine
from megatron_aspo.tools.report import write_report

pytestmark = pytest.mark.distributed


def config(folder: Path, resume: str) -> RunConfig:
    return tiny_run(
        folder,
        train=TrainConfig(steps=4, mini_batch_prompts=1, max_tokens_per_micro_batch=100),
        eval=EvalConfig(every=2, responses_per_prompt=1),
        checkpoint=CheckpointConfig(every=2, keep=0, resume=resume),
    )


def seen(folder: Path, resume: str, steps: int) -> list[tuple[str, bool, list[tuple[str, int]]]]:
    """(call, whether the engine is awake, logged (phase, step)) of every save, load and generation of a run."""
    settings = config(folder, resume)
    settings = replace(settings, train=replace(settings.train, steps=steps))
    calls: list[tuple[str, bool, list[tuple[str, int]]]] = []
    awake = [True]

    def note(call: str) -> None:
        logged = settings.run_dir / "metrics.jsonl"
        records = read_metrics(settings.run_dir) if logged.exists() else []
        calls.append((call, awake[0], [(record["phase"], record["step"]) for record in records]))

    class Recording(EmbeddedEngine):
        def generate(self, *arguments: Any, **named: Any) -> Any:
            note("generate")
            return super().generate(*arguments, **named)

        def refit(self) -> None:
            awake[0] = True
            super().refit()

        def sleep(self) -> None:
            awake[0] = False
            super().sleep()

    save, load = checkpoint.Saver.save, checkpoint.load

    def noted_save(*arguments: Any, **named: Any) -> Any:
        note("save")
        return save(*arguments, **named)

    def noted_load(*arguments: Any) -> Any:
        note("load")
        return load(*arguments)

    checkpoint.Saver.save, checkpoint.load = noted_save, noted_load
    assert train.run(settings, rollout=Recording)
    return calls


def test_saving_and_loading_find_the_engine_asleep(tmp_path: Path) -> None:
    (first,) = run(1, seen, tmp_path, "never", 2)
    (resumed,) = run(1, seen, tmp_path, "auto", 4)
    calls = first + resumed
    assert [awake for call, awake, _ in calls if call == "load"] == [False]
    assert [awake for call, awake, _ in calls if call == "save"] == [False, False]
    assert {awake for call, awake, _ in calls if call == "generate"} == {True}
    before_saves = [logged for call, _, logged in calls if call == "save"]
    assert [logged[-2:] for logged in before_saves] == [[("train", 2), ("eval", 2)], [("train", 4), ("eval", 4)]]

    records = read_metrics(tmp_path / "test")
    seconds = {
        name: [(record["phase"], record["step"]) for record in records if record.get(f"time/{name}", 0) > 0]
        for name in ("eval", "checkpoint")
    }
    assert seconds["eval"] == [("eval", 0), ("eval", 2), ("eval", 4)]
    assert seconds["checkpoint"] == [("checkpoint", 2), ("checkpoint", 4)]


def evaluated(folder: Path, **settings: Any) -> list[int]:
    """Steps after which a run of four steps evaluates."""
    start = config(folder, "never")
    assert train.run(replace(start, eval=replace(start.eval, **settings)))
    return [record["step"] for record in read_metrics(folder / "test") if record["phase"] == "eval"]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"at_end": False}, [0, 2]), ({"every": 0, "at_start": False, "at_end": False}, [])],
)
def test_evaluation_before_and_after_training_can_be_left_out(
    tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    assert run(1, partial(evaluated, tmp_path, **settings)) == [steps]
    write_report([tmp_path / "test"])
