"""Arguments of `megatron-aspo gpu-check`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("config", nargs="?", default="", help="YAML file of a run, whose sizes the last check takes")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="settings that replace the file's")
    parser.add_argument("--only", default="", metavar="N,N", help="numbers of checks")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of gpu_check.json and logs")
    parser.add_argument("--patience", type=float, default=1.0, metavar="X", help="factor of all time limits")
    parser.add_argument("--bare", action="store_true", help="the checks that need torch and Megatron-Core alone")
    parser.add_argument("--cpu", action="store_true", help="try the checks themselves, at tiny sizes on the CPU")
