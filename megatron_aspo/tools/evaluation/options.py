"""Options of `megatron-aspo eval` for benchmarks. Imports nothing slow."""

from __future__ import annotations

import argparse
from pathlib import Path

OPTIONS = ("temperature", "top_p", "samples", "prompt_template", "out")
"""Options that require `--benchmark`."""


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of an evaluation on benchmarks."""
    add = parser.add_argument
    add(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="evaluate on this benchmark instead of the run's held-out prompts; docs/evaluation.md lists them. "
        "reasoning_gym:TASK takes no file. Repeatable",
    )
    add("--temperature", type=float, help="default 0.8; 0 is greedy")
    add("--top-p", type=float, help="default 0.95")
    add("--samples", type=int, help="responses per problem (default: the benchmark's usual number)")
    add("--prompt-template", help="overrides the benchmark's; contains {prompt}")
    add("--out", type=Path, metavar="FOLDER", help="folder for results (default: runs/<name>/eval)")
