"""Files of a run: `metrics.jsonl`, `samples.jsonl` and the provenance of each attempt.

No file is overwritten: those of earlier attempts are renamed to `name.1.ext`, `name.2.ext`, ... Imports without torch.
"""

import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from megatron_aspo.errors import UserError
from megatron_aspo.journal.folder import CONFIG_FILE

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"

Record = dict[str, Any]
"""A line of metrics.jsonl: `step`, `phase`, `time` (unix seconds) and the metrics; None where not finite."""


def read_metrics(run_dir: Path) -> list[Record]:
    """Return the records of a run; UserError if it has none."""
    path = run_dir / METRICS_FILE
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise UserError(f"{run_dir} has no {METRICS_FILE}; give the folder of a run, such as runs/<name>")
    return list(read_lines(path))


def read_samples(run_dir: Path) -> Iterator[Record]:
    """Yield the lines of `samples.jsonl`, which may be many; none if there is no such file."""
    path = run_dir / SAMPLES_FILE
    if path.is_file():
        yield from read_lines(path)


def read_lines(path: Path) -> Iterator[Record]:
    """Yield the records of a file of JSON lines, without an incomplete last line that a kill may leave."""
    with path.open("rb") as file:  # the kill may have cut a character in two
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                yield {"step": record["step"], **record}
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}, line {number}, is damaged; delete the line") from None


def set_aside(*paths: Path) -> None:
    """Rename the paths that exist to `stem.N.suffix`, with the one lowest N that is free for all of them."""

    def numbered(path: Path, attempt: int) -> Path:
        return path.with_name(f"{path.stem}.{attempt}{path.suffix}")

    attempt = next(n for n in itertools.count(1) if not any(numbered(path, n).exists() for path in paths))
    for path in paths:
        if path.exists():
            path.rename(numbered(path, attempt))


def save_provenance(run_dir: Path, resolved_yaml: str, argv: Sequence[str]) -> None:
    """Write `config.yaml`, `git.txt` and `environment.txt`, from which an attempt can be repeated."""
    texts = {
        CONFIG_FILE: resolved_yaml,
        "git.txt": _git_state(Path(__file__).resolve().parents[2]),
        "environment.txt": _environment(argv),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    set_aside(*(run_dir / name for name in texts))
    for name, text in texts.items():
        (run_dir / name).write_text(text, encoding="utf-8")


def _git_state(root: Path) -> str:
    """Return commit, dirty flag, status and diff of the repository at `root`."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        return done.stdout

    # An installed package may lie inside another repository, as in a checkout's venv.
    if shutil.which("git") is None or not (root / ".git").exists():
        return "not a git checkout\n"
    status = git("status", "--porcelain")
    dirty = "yes" if status else "no"
    return f"commit {git('rev-parse', 'HEAD').strip()}\ndirty {dirty}\n\n{status}\n{git('diff', 'HEAD')}"


def _environment(argv: Sequence[str]) -> str:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = {
        "command": shlex.join(argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "ranks": os.environ.get("WORLD_SIZE", "1"),
        "cpus": os.cpu_count(),
        "gpus": ", ".join(gpus) or "none",
    }
    installed = (dist.metadata for dist in distributions())  # a distribution parses it at every access
    packages = {f"{found['Name'].lower().replace('_', '-')}=={found['Version']}" for found in installed}
    return "\n".join([*(f"{name}: {value}" for name, value in lines.items()), "", *sorted(packages), ""])
