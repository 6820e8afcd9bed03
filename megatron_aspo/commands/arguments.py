"""Arguments of the commands, and the exit code of every process."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.installed import check_hugging_face
from megatron_aspo.config.load import load_config
from megatron_aspo.config.run import Gpu, RunConfig, colocated
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.journal.folder import BASE, find_checkpoint, find_resume, find_weights, make_folders
from megatron_aspo.rollout.choice import check_engine
from megatron_aspo.tools.evaluation.options import add_benchmark_arguments

MODULES = {"train": "train", "eval": "evaluate", "export": "export", "check-rollout": "check_rollout"}
"""Modules of the commands that run on ranks."""

HELP = {
    "train": "train a policy",
    "eval": "evaluate a checkpoint on the held-out prompts or on benchmarks",
    "export": "write a checkpoint as a Hugging Face folder",
    "check-rollout": "compare the rollout engine's log-probs with the trainer's; exit code 1 on a mismatch",
    "plan": "rehearse a step of a run on simulated GPUs, and print its memory, time and faults",
    "report": "write the report of a run, or of several runs to compare",
    "doctor": "check this machine; exit code 1 if a check fails",
    "gpu-check": "run the program's parts on this machine's GPUs; exit code 1 if one fails",
}

HINTS = {
    "train": "checkpoints are intact; continue with --resume auto",
    "eval": "run it again: a benchmark continues after its last stored response",
}
"""Remedy after a RunError, by command."""

_CHECKPOINT = {
    "eval": f"a step_... folder, or {BASE} for the run's initial weights (default: the run's newest)",
    "export": "a step_... folder (default: the run's newest)",
    "check-rollout": "a step_... folder (default: the run's initial weights)",
}


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError in place of printing its usage, and takes no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def add_rank_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the arguments of a command that runs on ranks. Its process and its ranks parse the same words."""
    _add_config(parser)
    if command == "export":
        parser.add_argument("folder", type=Path, help="folder to write; must not exist")
    _add_overrides(parser)
    if command == "train":
        parser.add_argument("--resume", help='"auto", "never" or a checkpoint; same as checkpoint.resume=...')
    else:
        parser.add_argument("--checkpoint", help=_CHECKPOINT[command])
    if command == "eval":
        add_benchmark_arguments(parser)
    parser.add_argument("--nproc", type=int, help="ranks to start on this host (default: as few as possible)")
    parser.set_defaults(command=command)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megatron-aspo plan`."""
    _add_config(parser)
    _add_overrides(parser)
    parser.add_argument("--gpus", type=int, help="number of GPUs (default: from the section cluster)")
    parser.add_argument("--gpu", choices=get_args(Gpu), help="model of the GPUs (default: from the section cluster)")
    parser.add_argument(
        "--quick", action="store_true", help="rehearse one rank of the first stage, without checkpoints"
    )
    parser.add_argument("--build", "--rehearse", dest="gone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--ranks",
        type=_ranks,
        default=[],
        metavar="RANK,RANK",
        help="rehearsed ranks (default: the first rank of pipeline stages that differ)",
    )
    parser.add_argument(
        "--details", action="store_true", help="print lines of code, waits and collectives of every phase, not of one"
    )


def _ranks(text: str) -> list[int]:
    if not all(rank.isdecimal() for rank in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} should be numbers of ranks, such as 0,8")
    return [int(rank) for rank in text.split(",")]


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with overrides `a.b=c` after options too, which argparse refuses."""
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides"):
            parser.error(f"unrecognized arguments: {word}")
        arguments.overrides.append(word)
    return arguments


def parse_run_config(arguments: argparse.Namespace) -> RunConfig:
    """Load the configuration that the command line describes. Only training keeps `rollout.ranks`."""
    overrides = list(arguments.overrides)
    if getattr(arguments, "resume", None) is not None:
        overrides.append(f"checkpoint.resume={arguments.resume}")
    elif arguments.command in ("eval", "export", "check-rollout"):
        for word in overrides:
            if word.startswith("checkpoint.resume="):
                raise UserError(f"{word} is for training; choose the checkpoint by --checkpoint")
    config = load_config(arguments.config, overrides)
    return config if arguments.command == "train" else colocated(config)


def check_command(arguments: argparse.Namespace, config: RunConfig) -> None:
    """Raise the mistakes that can be found without torch, before slow imports and before ranks start."""
    command = arguments.command
    if config.model.hf_path:
        check_hugging_face()
    if command == "export":
        if not config.model.hf_path:
            raise UserError("model.hf_path is not set; only a model from Hugging Face's format can be exported to it")
        if arguments.folder.exists():
            raise UserError(f"{arguments.folder} exists already; remove it or name another folder")
    else:
        check_engine(config.rollout, config.reward)
    if command == "train":
        _check_files(config.data)
        make_folders(config)
        find_resume(config)
    elif command == "eval":
        from megatron_aspo.tools.evaluation.plan import EvaluationPlan

        EvaluationPlan.from_arguments(arguments, config)
        find_weights(config, arguments.checkpoint)
    elif command == "export" or arguments.checkpoint is not None:
        find_checkpoint(config, arguments.checkpoint)


def _check_files(data: DataConfig) -> None:
    """Raise UserError if a configured path has no files."""
    for source in data.all_sources:
        for name in ("path", "eval_path"):
            if path := getattr(source, name):
                from megatron_aspo.data.files import find_files  # takes a second to import

                find_files(path, f"data.{name}")


def run_rank(
    command: str, action: Callable[[argparse.Namespace, RunConfig], int], argv: Sequence[str] | None = None
) -> int:
    """Parse the command line of one rank and call `action`; return the exit code."""

    def run() -> int:
        parser = Parser(prog=f"megatron_aspo.commands.{MODULES[command]}")
        add_rank_arguments(parser, command)
        arguments = parse(parser, argv)
        config = parse_run_config(arguments)
        check_command(arguments, config)
        return action(arguments, config)

    return exit_code(run, HINTS.get(command, ""))


def exit_code(action: Callable[[], int], hint: str = "") -> int:
    """Return the exit code of `action`; 2 after a UserError, 1 after a RunError, each printed in one line.

    Each host's first rank prints a UserError. Each rank prints its RunError, after the traceback of the error's cause
    and before `hint`.
    """
    try:
        return action()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"megatron-aspo: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except RunError as error:
        if error.__cause__ is not None:
            traceback.print_exc()
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        message = "; ".join(filter(None, (" ".join(str(error).split()), hint)))
        print(f"megatron-aspo: {rank}{message}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of the run; see examples/")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="settings that replace the file's")
