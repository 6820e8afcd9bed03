"""Runs of the study of objectives and anchors: what is missing in runs/study/BLOCK, some at a time.

    .venv/bin/python examples/study/run.py BLOCK... [--seeds 101-112] [--unpacked] [--workers 2] [--dry-run]

It can be stopped and started again: complete runs stay, the others continue from their last checkpoint. With
`--unpacked` another machine goes on where the packed runs in examples/study/results end: with whole seeds of a block,
because runs that are compared need one warm start. A seed's runs follow each other; the first makes the warm start.

Every run is a training run of the package with the settings of design.py. A run that an error ends after its first step
is an outcome: the error is recorded, the other runs go on. Errors of the machine (a full disk, a signal) are none, and
such a run continues the next time. Seeds up to 100 are pilots and are not pooled with the counted ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from design import ARMS, BLOCKS, FOLDER, MARKS_FILE, ROOT, Run, marks, planned_seeds, runs
from packed import packed_file

from megatron_aspo.errors import UserError
from megatron_aspo.journal.files import write_atomically
from megatron_aspo.journal.log import METRICS_FILE, read_metrics


def recorded(run: Run) -> dict[str, Any]:
    """The marks of a run that was begun, and its error; empty for any other run."""
    path = run.folder / MARKS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def record(run: Run, error: str | None = None) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(run.folder / MARKS_FILE) as path:
        path.write_text(json.dumps({**marks(run), "error": error}), encoding="utf-8")


def check_marks(run: Run) -> None:
    """Raise UserError if the run was begun under other claims or another design: one run has one of each."""
    before = recorded(run)
    changed = [name for name, mark in marks(run).items() if before and before[name] != mark]
    if changed:
        raise UserError(f"{run.folder} was begun under another state of: {', '.join(changed)}; move the folder away")


def trained_steps(run: Run) -> int:
    return sum(r["phase"] == "train" for r in _metrics(run))


def is_over(run: Run) -> bool:
    """Whether a run is complete, or was ended by an error after its first step."""
    if recorded(run).get("error"):
        return trained_steps(run) > 0
    return any(r["phase"] == "eval" and r["step"] == run.steps for r in _metrics(run))


def _metrics(run: Run) -> list[Any]:
    return list(read_metrics(run.folder)) if (run.folder / METRICS_FILE).is_file() else []


def is_of_the_machine(error: Exception) -> bool:
    return any(isinstance(e, OSError | MemoryError | UserError) for e in (error, error.__cause__))


def train(run: Run) -> None:
    """Train in this process, whose output goes to a log beside the run's folder."""
    record(run)
    with open(f"{run.folder}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    block = BLOCKS[run.block]
    settings = [*run.settings, f"output_dir={run.folder.parent}"]
    arguments = [str(block.config), *settings]
    if block.ranks == 1:
        from megatron_aspo.commands.train import run as train_here
        from megatron_aspo.config.load import load_config

        try:
            train_here(load_config(block.config, settings), argv=["train", *arguments])
        except Exception as error:
            if not is_of_the_machine(error):
                record(run, f"{type(error).__name__}: {' '.join(str(error).split())}")
            raise
    else:
        from megatron_aspo.cli import main as command

        sys.exit(command(["train", *arguments, "--nproc", str(block.ranks)]))


def make(missing: list[Run], workers: int) -> list[str]:
    """Make the runs, `workers` ranks at a time, each run in a process of its own, those of fewest ranks first. Return a
    line for each that failed; the others go on."""
    # Runs are forks of a process that has imported everything, which takes some seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_aspo.commands.train", "tensorboard.summary.writer.event_file_writer"])

    def one(run: Run) -> str | None:
        begin = time.time()
        process = context.Process(target=train, args=(run,))
        process.start()
        process.join()
        error = recorded(run).get("error") or f"exit code {process.exitcode}, see {run.folder}.log"
        end = error if process.exitcode else f"{time.time() - begin:.0f} s"
        print(f"{time.strftime('%H:%M:%S')} {run.block} {run.name}: {end}", flush=True)
        return f"{run.block}/{run.name}: {error}" if process.exitcode else None

    def in_turn(of_seed: list[Run]) -> list[str]:
        return [failure for run in of_seed if (failure := one(run))]

    def ranks_of(run: Run) -> int:
        return BLOCKS[run.block].ranks

    failures: list[str] = []
    for ranks, alike in itertools.groupby(sorted(missing, key=ranks_of), key=ranks_of):
        by_seed = [list(group) for _, group in itertools.groupby(alike, key=lambda run: (run.block, run.seed))]
        with ThreadPoolExecutor(max(workers // ranks, 1)) as pool:
            failures += itertools.chain.from_iterable(pool.map(in_turn, by_seed))
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="+", choices=BLOCKS, metavar="BLOCK", help=", ".join(BLOCKS))
    parser.add_argument("--seeds", help="first-last; by default those of claims.yaml")
    parser.add_argument("--arms", nargs="+", help="by default the block's")
    parser.add_argument("--lr", nargs="+", type=float, help="by default the block's")
    parser.add_argument("--k", nargs="+", type=int, help="stalenesses, by default the block's")
    parser.add_argument("--unpacked", action="store_true", help="only seeds that lack a packed run in the block")
    parser.add_argument("--workers", type=int, default=2, help="ranks at a time")
    parser.add_argument("--dry-run", action="store_true", help="list the runs that are missing")
    arguments = parser.parse_args()
    first, _, last = (arguments.seeds or "").partition("-")
    chosen = range(int(first), int(last or first) + 1) if first else None
    every = [run for block in arguments.blocks for run in runs(block, chosen or planned_seeds(block))]
    every = [run for run in every if run.arm in (arguments.arms or ARMS) and run.lr in (arguments.lr or [run.lr])]
    every = [run for run in every if run.staleness in (arguments.k or [run.staleness])]
    if arguments.unpacked:
        unpacked = {(run.block, run.seed) for run in every if not packed_file(run.key).exists()}
        every = [run for run in every if (run.block, run.seed) in unpacked]
    try:
        for run in every:
            check_marks(run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    missing = [run for run in every if not is_over(run)]
    print(f"{len(missing)} of {len(every)} runs are missing", flush=True)
    if arguments.dry_run:
        print("\n".join(f"{run.block}/{run.name}" for run in missing))
        return

    from countdown import write_files

    write_files(FOLDER / "data")
    os.chdir(ROOT)
    failures = make(missing, arguments.workers)
    if failures:
        print("failed:", *failures, sep="\n  ")
    sys.exit(0 if all(is_over(run) for run in missing) else 1)


if __name__ == "__main__":
    main()
