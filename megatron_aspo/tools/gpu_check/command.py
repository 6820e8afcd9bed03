"""`megatron-aspo gpu-check`: chooses checks and GPUs, runs them, prints a table. Exit code 1 if a check fails.

`python -m megatron_aspo.tools.gpu_check.command` is the same without the packages of the command line.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_aspo.errors import UserError
from megatron_aspo.tools.doctor.probes import TorchFacts, ask, installed, torch_facts
from megatron_aspo.tools.gpu_check.arguments import add_arguments
from megatron_aspo.tools.gpu_check.records import MODULES, Check, Lab, load_checks
from megatron_aspo.tools.gpu_check.runner import Result, run_checks, write_results

BARE_MODULES = ("loss", "layers", "optimizer")
PACKAGES = ("torch", "triton", "transformers", "megatron-core", "transformer-engine-torch", "vllm")
"""Packages whose versions gpu_check.json has."""


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen checks; print a table and write gpu_check.json.

    Raises:
        UserError: there is no GPU, or no such check.
    """
    facts = TorchFacts() if arguments.cpu else torch_facts()
    if facts.error:
        raise UserError(f"torch finds no GPU: {facts.error}; run megatron-aspo doctor")
    if not facts.capabilities and not arguments.cpu:
        build = f"for CUDA {facts.cuda}" if facts.cuda else "for CPUs"
        raise UserError(f"there is no CUDA GPU here (torch is built {build}); --cpu tries the checks at tiny sizes")
    checks = [replace(check, seconds=check.seconds * arguments.patience) for check in choose(arguments)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = visible if visible != [""] else [str(i) for i in range(len(facts.capabilities))]
    if arguments.cpu:
        checks, gpus = [replace(check, gpus=1, seconds=10 * check.seconds) for check in checks], [""]
    for number in (signal.SIGTERM, signal.SIGHUP):  # by which the running checks and their files end too
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    machine: dict[str, Any] = {"gpus": ask("nvidia-smi", "-L")[0].splitlines()} if shutil.which("nvidia-smi") else {}
    machine |= {"cuda": facts.cuda, "nccl": facts.nccl} | {name: installed(name) for name in PACKAGES}
    with tempfile.TemporaryDirectory(prefix=f"gpu-check-{os.getpid()}-", dir=_scratch()) as folder:
        device = "cpu" if arguments.cpu else "cuda"
        lab = Lab(folder, device, arguments.bare, str(arguments.config), tuple(arguments.overrides))
        for event in run_checks(checks, lab, gpus, arguments.out):
            if isinstance(event, Check):
                print(f"running  {event.name}", file=sys.stderr, flush=True)
            else:
                print(event, file=sys.stderr, flush=True)
                results.append(event)
                write_results(results, machine, arguments.out / "gpu_check.json")
    results.sort(key=lambda result: [check.name for check in checks].index(result.check.name))
    counts = [sum(result.status == status for result in results) for status in ("passed", "failed", "not run")]
    print(*results, sep="\n")
    print("{} passed, {} failed, {} not run;".format(*counts), arguments.out / "gpu_check.json")
    return 1 if counts[1] or not counts[0] else 0


def choose(arguments: argparse.Namespace) -> list[Check]:
    """The checks of this form that were asked for, in their order."""
    known = load_checks(BARE_MODULES if arguments.bare else MODULES)
    form = [check for check in known if (check.bare if arguments.bare else check.name[0].isdigit())]
    form = [check for check in form if check.on_cpu] if arguments.cpu else form
    only = set(filter(None, arguments.only.split(",")))
    if unknown := only - {number for check in form for number in check.numbers}:
        raise UserError(f"--only={','.join(sorted(unknown))} names no check of this form; leave it out to run all")
    chosen = [check for check in form if not only or only & check.numbers]
    needed = {check.after for check in chosen} | {check.name for check in chosen}
    return [check for check in form if check.name in needed]


def _scratch() -> str | None:
    """Models and checkpoints, of a large recipe 20 GB, lie in memory where there is room."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        return None
    free = os.statvfs(memory)
    return str(memory) if free.f_bavail * free.f_frsize > 64 << 30 else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except UserError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
