"""`megatron-aspo`: reads the command line and starts ranks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_aspo import __version__
from megatron_aspo.commands.arguments import (
    HELP,
    HINTS,
    MODULES,
    Parser,
    add_plan_arguments,
    add_rank_arguments,
    check_command,
    exit_code,
    parse,
    parse_run_config,
)
from megatron_aspo.config.checks import check_world_size
from megatron_aspo.config.load import load_config
from megatron_aspo.errors import UserError
from megatron_aspo.tools.gpu_check import arguments as gpu_check


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `megatron-aspo`."""
    words = sys.argv[1:] if argv is None else list(argv)

    def run() -> int:
        arguments = parse(build_parser(), words)
        if arguments.command == "report":
            from megatron_aspo.tools.report import write_report

            print(write_report(arguments.run_dirs, arguments.out))
            return 0
        if arguments.command == "doctor":
            from megatron_aspo.tools.doctor import doctor

            return doctor.main()
        if arguments.command == "gpu-check":
            from megatron_aspo.tools.gpu_check import command

            return command.run(arguments)
        if arguments.command == "plan":
            return _plan(arguments)
        return _run_ranks(arguments, words[1:])

    return exit_code(run)


def build_parser() -> Parser:
    """Build the parser of all commands."""
    parser = Parser(prog="megatron-aspo", description="ASPO reinforcement learning on Megatron-Core.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(HELP))
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in HELP.items()}
    for name in MODULES:
        add_rank_arguments(parsers[name], name)
    add_plan_arguments(parsers["plan"])
    parsers["plan"].epilog = "exit code: 0 all checks pass, 1 a check fails, 2 a setting is wrong"
    gpu_check.add_arguments(parsers["gpu-check"])
    parsers["report"].add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="runs/<name>")
    parsers["report"].add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: the run's folder; report/ for several runs"
    )
    return parser


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_aspo.tools.planning.plan import make_plan
    from megatron_aspo.tools.rehearsal.findings import check, check_neighbours
    from megatron_aspo.tools.rehearsal.run import check_parts, check_ready, rehearse, rehearse_neighbours
    from megatron_aspo.tools.rehearsal.show import print_header, print_rehearsal

    if arguments.gone:
        raise UserError(
            "plan has no --build and no --rehearse: it always rehearses the run and checks the model's files; --quick "
            "rehearses one rank"
        )
    plan = make_plan(load_config(arguments.config, arguments.overrides), arguments.gpus, arguments.gpu)
    check_ready(plan, arguments.ranks or ())
    print_header(plan)
    whole: dict[str, list[str]] = {}
    if not arguments.quick:
        whole["the model's files and a checkpoint are whole"] = check_parts(plan).findings
        whole |= check_neighbours(*rehearse_neighbours(plan), plan)
    traces = rehearse(plan, arguments.ranks or [0] * arguments.quick, save=not arguments.quick)
    checks = check(traces, plan) | whole
    print_rehearsal(traces, plan, checks, arguments.details)
    return 1 if any(checks.values()) else 0


def _run_ranks(arguments: argparse.Namespace, words: list[str]) -> int:
    from megatron_aspo.ranks.launch import compute_capability, rank_environment, run_local

    config = parse_run_config(arguments)
    fewest = config.parallel.model_parallel_size + config.rollout.ranks
    ranks = fewest if arguments.nproc is None else arguments.nproc
    check_world_size(config.parallel, config.rollout, ranks)
    check_command(arguments, config)
    print(f"megatron-aspo: starting {ranks} rank(s); the imports take some seconds", file=sys.stderr, flush=True)
    module = f"megatron_aspo.commands.{MODULES[arguments.command]}"
    environment = rank_environment(config.parallel, compute_capability())
    return run_local(module, words, ranks, HINTS.get(arguments.command, ""), environment)


if __name__ == "__main__":
    sys.exit(main())
