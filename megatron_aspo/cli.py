"""The command line: `megatron-aspo train | eval | export | check-rollout | plan | report | metrics | doctor`.

Nothing heavy is imported before the configuration has been read and found sound.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_aspo import __version__
from megatron_aspo.config import GPUS, RunConfig, colocated
from megatron_aspo.config_checks import check_hugging_face, check_installed, check_world_size
from megatron_aspo.config_file import load_config
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.evaluation.options import add_benchmark_arguments, benchmark_arguments
from megatron_aspo.rollout.engine import check_engine
from megatron_aspo.run_folder import BASE, find_checkpoint, find_resume, find_weights, make_folders

HINTS = {
    "train": "what has been saved is intact, and training goes on with --resume auto",
    "eval": "run it again: a benchmark goes on where it ended",
}
"""What to do after a command's run has ended by no mistake of the user's."""


class Parser(argparse.ArgumentParser):
    """One line for a mistake instead of the whole usage; no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `megatron-aspo`."""

    def run() -> int:
        arguments = parse(build_parser(), argv)
        check_installed()
        if arguments.command == "report":
            from megatron_aspo.report import print_summary, write_report

            paths = write_report(arguments.run_dirs, arguments.out)
            print_summary(arguments.run_dirs)
            print("\n".join(str(path) for path in paths))
            return 0
        if arguments.command == "metrics":
            from megatron_aspo.show_metrics import metrics_table

            lines, notes = metrics_table(arguments.run_dir, arguments.names)
            print("\n".join(lines))
            print("".join(f"note: {note}\n" for note in notes), end="", file=sys.stderr)
            return 0
        if arguments.command == "doctor":
            from megatron_aspo import doctor

            return doctor.main(arguments.json)
        if arguments.command == "plan":
            return _plan(arguments)
        return _run_ranks(arguments)

    return exit_code(run)


def build_parser() -> Parser:
    """Of all commands."""
    parser = Parser(prog="megatron-aspo", description="ASPO reinforcement learning on Megatron-Core.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    names = "train | eval | export | check-rollout | plan | report | metrics | doctor"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for name, add_arguments, help_text in (
        ("train", add_run_arguments, "train a policy; starts the ranks of one host itself, or runs under torchrun"),
        ("eval", add_eval_arguments, "evaluate a checkpoint on the held-out prompts, or on benchmarks"),
        ("export", add_export_arguments, "write a checkpoint as a Hugging Face folder"),
        ("check-rollout", add_check_arguments, "compare the rollout engine's log-probs with the trainer's"),
    ):
        sub = commands.add_parser(name, help=help_text, description=help_text)
        add_arguments(sub)
        sub.add_argument(
            "--nproc",
            type=int,
            help="ranks on this host (default: the fewest possible)",
        )
    plan_help = "say what a run would take: memory by phase, tokens, operations, time; starts nothing"
    plan = commands.add_parser("plan", help=plan_help, description=plan_help, epilog=PLAN_EXIT_CODES)
    add_plan_arguments(plan)
    report_help = "write report.html and report.png of a run, or of several that are compared"
    report = commands.add_parser("report", help=report_help, description=report_help)
    report.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="runs/<name>")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="default: the run's folder; of several, report/")
    metrics_help = "print metrics of a run, a line a step"
    metrics = commands.add_parser("metrics", help=metrics_help, description=metrics_help)
    metrics.add_argument("run_dir", type=Path, metavar="RUN", help="runs/<name>")
    metrics.add_argument(
        "names",
        nargs="*",
        default=[],
        metavar="METRIC",
        help="such as loss/entropy or 'time/*' (default: list the names)",
    )
    doctor = commands.add_parser("doctor", help="look for what is wrong with this machine; exit code 1 if something is")
    doctor.add_argument("--json", action="store_true", help="for programs")
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a training run."""
    _add_config_arguments(parser)
    parser.add_argument("--resume", help='"auto", "never" or a checkpoint: short for checkpoint.resume=...')


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of an evaluation."""
    _add_config_arguments(parser)
    parser.add_argument(
        "--checkpoint",
        help=f"a step_... folder (default: the newest of the run), or {BASE}: the weights that a run starts from",
    )
    add_benchmark_arguments(parser)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of an export."""
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("folder", type=Path, help="the folder to write; it must not exist yet")
    _add_overrides(parser)
    _add_checkpoint_argument(parser)


PLAN_EXIT_CODES = "exit code: 0 the run fits, 1 it does not fit, 2 the configuration is wrong"


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a plan."""
    _add_config_arguments(parser)
    parser.add_argument("--gpus", type=int, help="how many (default: those of the file's section cluster)")
    parser.add_argument("--gpu", choices=GPUS, help="of which kind (default: that of the file's section cluster)")
    parser.add_argument("--build", action="store_true", help="build every kind of rank at full size, without memory")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the memory of every phase")


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_aspo.planning.plan import make_plan, plan_dict

    plan = make_plan(load_config(arguments.config, arguments.overrides), arguments.gpus, arguments.gpu)
    if arguments.picture:
        from megatron_aspo.planning.show import draw_plan

        draw_plan(plan, arguments.picture)
    built = None
    if arguments.build:
        from megatron_aspo.planning.build import build_plan  # takes seconds to import

        built = build_plan(plan)
    if arguments.json:
        print(json.dumps(plan_dict(plan) | ({"build": built.to_dict()} if built else {}), indent=1))
    else:
        from megatron_aspo.planning.show import print_plan

        print_plan(plan)
        if built:
            print(built)
    return 0 if plan.fits else 1


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a check of the rollout engine."""
    _add_config_arguments(parser)
    parser.add_argument("--checkpoint", help="a step_... folder (default: the weights that a run starts from)")


def check_export(config: RunConfig, folder: Path) -> None:
    """Raise UserError where an export would fail after minutes."""
    if not config.model.hf_path:
        raise UserError("only a model that came from Hugging Face's format can go back there; set model.hf_path")
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or name another folder")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, taking `a.b=c` also after an option, where argparse does not look for it."""
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides"):
            parser.error(f"unrecognized arguments: {word}")
        arguments.overrides.append(word)
    return arguments


def parse_run_config(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that the command line describes."""
    overrides = list(arguments.overrides)
    if getattr(arguments, "resume", None) is not None:
        overrides.append(f"checkpoint.resume={arguments.resume}")
    return load_config(arguments.config, overrides)


def exit_code(action: Callable[[], int], hint: str = "") -> int:
    """Run `action`; a UserError becomes one line on stderr and exit code 2, a RunError one line that ends with `hint`
    (of every rank that has it, behind the traceback of what caused it, if anything did) and exit code 1.

    A host's first rank speaks for all of it: what a UserError complains of may lack on one host only.
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
        told = "; ".join(filter(None, (" ".join(str(error).split()), hint)))
        print(f"megatron-aspo: {rank}{told}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file; examples/ has ones that run")
    _add_overrides(parser)


def _add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", help="a step_... folder (default: the newest of the run)")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="settings that replace the file's")


def _check_files(config: RunConfig) -> None:
    """Raise UserError where there are no files at the configured paths; what they hold is the ranks' to check."""
    sources = config.data.all_sources
    if any(source.path for source in sources):
        from megatron_aspo.data.files import find_files

        for source in sources:
            for name in ("path", "eval_path"):
                if getattr(source, name):
                    find_files(getattr(source, name), f"data.{name}")


def _run_ranks(arguments: argparse.Namespace) -> int:
    from megatron_aspo.launch import run_local

    config = parse_run_config(arguments)
    if arguments.command != "train":
        config = colocated(config)
    least = config.parallel.model_parallel_size + config.rollout.ranks
    ranks = least if arguments.nproc is None else arguments.nproc
    if ranks < 1:
        raise UserError(f"--nproc={ranks} must be >= 1")
    check_world_size(config, ranks)
    # What the ranks would find out after their slow imports.
    if config.model.hf_path:
        check_hugging_face()
    if arguments.command != "export":
        check_engine(config.rollout)
    if arguments.command == "train":
        _check_files(config)
        make_folders(config)
        find_resume(config)
    elif arguments.command == "eval":
        from megatron_aspo.evaluation.plan import EvaluationPlan

        EvaluationPlan.of(arguments, config)
        find_weights(config, arguments.checkpoint)
    elif arguments.command != "check-rollout" or arguments.checkpoint is not None:
        find_checkpoint(config, arguments.checkpoint)
    positional = [arguments.config]
    if arguments.command == "export":
        check_export(config, arguments.folder)
        positional.append(str(arguments.folder))
    modules = {"train": "train", "eval": "evaluation", "export": "export", "check-rollout": "check_rollout"}
    module = modules[arguments.command]
    option = "resume" if arguments.command == "train" else "checkpoint"
    value = getattr(arguments, option)
    rest = [*positional, *arguments.overrides, *([f"--{option}", value] if value is not None else [])]
    if arguments.command == "eval":
        rest += benchmark_arguments(arguments)
    print(f"megatron-aspo: starting {ranks} rank(s); the imports take some seconds", file=sys.stderr, flush=True)
    return run_local(f"megatron_aspo.{module}", rest, ranks, HINTS.get(arguments.command, ""))


if __name__ == "__main__":
    sys.exit(main())
