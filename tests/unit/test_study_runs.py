"""The study's runner, with real runs of its task: one that an error ends counts, and the others go on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing.dummy
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from design import BLOCKS, MARKS_FILE, Block, Run, faults, marks, runs
from measures import MEASURES
from packed import SECTIONS, SUFFIX, load, pack
from pydantic_core import to_jsonable_python
from run import check_marks, is_of_the_machine, is_over, make

from megatron_aspo.config.load import load_config
from megatron_aspo.errors import RunError, UserError

STUDY = Path(__file__).parents[2] / "examples" / "study"
FAST = [
    *("warmup.updates=2", "eval.every=1", "rollout.prompts_per_step=4", "checkpoint.every=0"),
    *("optimizer.max_skipped_updates=1", "optimizer.lr_warmup_updates=0", "train.epochs=1", "journal.trackers=[]"),
    *("data.eval_prompts=2", "eval.responses_per_prompt=1", "loss.entropy_coef=0.1"),  # a gradient without reward
]
RATES = {1e30: 4, 1.5e-4: 2}
"""The first rate makes weights of 1e30 in the only update of its first step; the second step cannot be made."""

SCRIPT = """
import multiprocessing, os, sys
from pathlib import Path
import countdown, design, run
design.FOLDER = run.FOLDER = Path(sys.argv[1])
design.BLOCKS["B"] = design.Block(("grpo",), {rates}, {settings})
countdown.PROBLEMS = 64
countdown.write_files(Path("runs/study/data"))
fork = multiprocessing.get_context("fork")  # a child that has this block
multiprocessing.get_context = lambda _: fork
if __name__ == "__main__":
    print(run.make(run.runs("B", [101]), 1))
"""


def test_run_that_an_error_ends_is_an_outcome_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{rates}", repr(RATES)).replace("{settings}", repr(FAST)))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(STUDY), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\['B/grpo-lr1e\+30-k0-seed101: \w+Error: .*'\]", done.stdout), done.stdout
    monkeypatch.setitem(BLOCKS, "B", Block(("grpo",), RATES, FAST))
    monkeypatch.setattr("design.FOLDER", tmp_path)
    failed, complete = (Run("B", "grpo", lr, 0, 101) for lr in RATES)
    assert is_over(failed)
    assert is_over(complete)
    assert len(pack(tmp_path, tmp_path / "results")) == 2
    packed = load(tmp_path / "results")
    assert packed.refused == []
    assert MEASURES["collapse"](packed.runs[failed.key]) == 1
    assert len(packed.runs[failed.key].train["step"]) == 4
    assert packed.runs[complete.key].error is None


def test_run_of_other_claims_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("design.FOLDER", tmp_path)
    run = Run("B", "grpo", 1.5e-4, 0, 101)
    check_marks(run)
    run.folder.mkdir(parents=True)
    (run.folder / MARKS_FILE).write_text(json.dumps({"claims": "0", "design": "0", "error": None}))
    with pytest.raises(UserError, match=r"was begun under another state of: claims, design; move the folder away"):
        check_marks(run)


def test_demonstration_of_other_settings_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its seeds are those of pilots, which count at any number of steps."""
    run = runs("smollm2", [2])[1]
    config = load_config(BLOCKS["smollm2"].config, run.settings)
    settings = {name: to_jsonable_python(dataclasses.asdict(config))[name] for name in SECTIONS}
    made_under = marks(run)
    assert made_under["claims"] == "none"  # claims may change between its runs, and so may the study's task
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "another task")
    assert list(faults(run.key, settings, made_under)) == []
    settings["train"]["steps"] = 5
    assert list(faults(run.key, settings, made_under)) == ["train.steps=20 is planned, the run has 5"]


def test_all_runs_are_made_anew_with_at_most_the_given_number_of_ranks_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make evidence-run` names every block that the page shows, the demonstration of two ranks a run included."""
    makefile = (STUDY.parents[1] / "Makefile").read_text(encoding="utf-8")
    (blocks,) = re.findall(r"study/run\.py (.*?);", makefile)
    assert blocks.split() == list(BLOCKS)
    journal = tmp_path / "journal"

    def write_down(run: Run) -> None:
        with journal.open("a") as file:
            file.write(f"{BLOCKS[run.block].ranks}\n")
        time.sleep(0.3)
        with journal.open("a") as file:
            file.write(f"-{BLOCKS[run.block].ranks}\n")

    threads = SimpleNamespace(Process=multiprocessing.dummy.Process, set_forkserver_preload=lambda _: None)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: threads)
    monkeypatch.setattr("run.train", write_down)
    monkeypatch.setattr("design.FOLDER", tmp_path)
    chosen = [*runs("smollm2", [1, 2]), *runs("B", [101, 102])]
    assert make(chosen, 2) == []
    at_once = list(itertools.accumulate(int(line) for line in journal.read_text().splitlines()))
    assert len(at_once) == 2 * len(chosen)
    assert max(at_once) == 2


def test_errors_of_the_machine_are_no_outcomes() -> None:
    full = RunError("cannot write")
    full.__cause__ = OSError(28, "No space left on device")
    assert is_of_the_machine(full)
    assert is_of_the_machine(MemoryError())
    assert not is_of_the_machine(RunError("gradients are not finite"))


def test_another_machine_leaves_out_packed_seeds() -> None:
    """The chosen pilots of seeds 1 to 4 are packed, and one of seed 6. Its other runs need its warm start."""
    chosen = ["A", "--seeds", "1-6", "--arms", "aspo", "grpo", "--unpacked", "--dry-run"]
    done = subprocess.run([sys.executable, str(STUDY / "run.py"), *chosen], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *missing = done.stdout.splitlines()
    packed = {path.name.removesuffix(SUFFIX) for path in (STUDY / "results" / "A").iterdir()}
    assert "grpo-lr0.00015-k0-seed6" in packed
    every = {run.name for run in runs("A", [5, 6]) if run.arm in ("aspo", "grpo")}
    assert {f"A/{name}" for name in every} == set(missing)
    assert first == "8 of 8 runs are missing"
