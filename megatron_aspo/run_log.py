"""What a run leaves on disk: `metrics.jsonl`, `samples.jsonl`, TensorBoard scalars, and the provenance of each attempt.

`metrics.jsonl` is the record; TensorBoard is a view of it. Nothing is ever overwritten: a file in the way
is set aside as `name.1.ext`, `name.2.ext`, ..., so the unnumbered one is always the newest attempt's.
Importing this module does not import torch: the report needs only `read_metrics` and `read_samples`.
"""

import contextlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from megatron_aspo.errors import RunError, UserError
from megatron_aspo.run_folder import CONFIG_FILE

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
TENSORBOARD_DIR = "tensorboard"

Record = dict[str, Any]
"""A line of metrics.jsonl: `step`, `phase`, `time` (unix seconds) and the metrics; None where not finite."""


class RunLog:
    """Appends metrics to `run_dir/metrics.jsonl` and `run_dir/tensorboard/`, samples to `run_dir/samples.jsonl`. For
    rank 0 only.

    resume_step: the step of the checkpoint that the run continues from; what was logged past it is dropped,
        since those steps are done again. None starts afresh and sets the logs of an earlier attempt aside.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        metrics, tensorboard = run_dir / METRICS_FILE, run_dir / TENSORBOARD_DIR
        self._samples = run_dir / SAMPLES_FILE
        hidden: list[Record] = []
        if resume_step is None:
            _set_aside(metrics, self._samples, tensorboard)
        else:
            if metrics.exists():
                hidden = _rewind(metrics, resume_step)
            _rewrite(self._samples, (line for line in read_samples(run_dir) if line["step"] <= resume_step))
        purge_step = None if resume_step is None else resume_step + 1
        self._file = metrics.open("a")
        self._writer = SummaryWriter(str(tensorboard), purge_step=purge_step)
        for record in hidden:
            self._write_scalars(record)

    def log(self, step: int, phase: str, values: dict[str, float]) -> None:
        """Append one record. phase: "warmup", "train" or "eval"; each counts its own steps."""
        record = {
            "step": step,
            "phase": phase,
            "time": time.time(),
            **_finite({k: float(v) for k, v in values.items()}),
        }
        with _writing(self._file.name):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            self._write_scalars(record)

    def log_samples(self, records: Iterable[Record]) -> None:
        """Append lines to `samples.jsonl`, each with its `step`."""
        with _writing(self._samples), self._samples.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(_finite(record)) + "\n" for record in records)

    def close(self) -> None:
        for file in (self._file, self._writer):
            # Every record was flushed: what a full disk did not take has been told when it was logged.
            with contextlib.suppress(OSError):
                file.close()

    def _write_scalars(self, record: Record) -> None:
        prefix = "warmup/" if record["phase"] == "warmup" else ""
        for key, value in record.items():
            if key not in ("step", "phase", "time") and value is not None:
                self._writer.add_scalar(prefix + key, value, record["step"], walltime=record["time"])
        self._writer.flush()


@contextlib.contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """A full disk, or a quota, in a line."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; make room") from error


def read_metrics(run_dir: Path) -> list[Record]:
    """The records of a run as they were written, without the torn last line that a kill may leave."""
    path = run_dir / METRICS_FILE
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise UserError(f"{run_dir} has no {METRICS_FILE}; give the folder of a run, such as runs/<name>")
    return list(_read_lines(path, ("step", "phase")))


def read_samples(run_dir: Path) -> Iterator[Record]:
    """The lines of `samples.jsonl` one by one, since they may be many; none if there is no such file."""
    path = run_dir / SAMPLES_FILE
    if path.is_file():
        yield from _read_lines(path, ("step", "group", "prompt", "responses"))


def _read_lines(path: Path, needed: Sequence[str]) -> Iterator[Record]:
    """The whole lines of a file of JSON objects that have the needed keys."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):  # a kill tore it
                return
            try:
                record = json.loads(line)
                yield {key: record[key] for key in needed} | record
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}, line {number}, is damaged; delete the line") from None


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: a null says "not finite" in a line that every reader understands."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value


def save_provenance(run_dir: Path, resolved_yaml: str, argv: list[str]) -> None:
    """Write `config.yaml`, `git.txt` and `environment.txt`: what it takes to repeat this attempt."""
    texts = {
        CONFIG_FILE: resolved_yaml,
        "git.txt": _git_state(Path(__file__).resolve().parent.parent),
        "environment.txt": _environment(argv),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    _set_aside(*(run_dir / name for name in texts))
    for name, text in texts.items():
        (run_dir / name).write_text(text, encoding="utf-8")


def _rewind(metrics: Path, step: int) -> list[Record]:
    """Drop the train and eval records past `step`; return the kept ones that TensorBoard's purge hides.

    The purge knows steps but no phases: it also hides the warm-up steps past `step`, which still stand.
    """
    records = read_metrics(metrics.parent)
    kept = [record for record in records if record["phase"] == "warmup" or record["step"] <= step]
    _rewrite(metrics, kept)
    return [record for record in kept if record["step"] > step]


def _rewrite(path: Path, records: Iterable[Record]) -> None:
    """Put the records in the place of the file's, if there is one."""
    if path.exists():
        new = path.with_suffix(".tmp")
        with new.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        os.replace(new, path)  # atomic: a kill right here loses no line


def _set_aside(*paths: Path) -> None:
    """Rename the paths that exist to `stem.N.suffix`, with the one lowest N that is free for all of them."""
    attempt = 1
    while any(_numbered(path, attempt).exists() for path in paths):
        attempt += 1
    for path in paths:
        if path.exists():
            path.rename(_numbered(path, attempt))


def _numbered(path: Path, attempt: int) -> Path:
    return path.with_name(f"{path.stem}.{attempt}{path.suffix}")


def _git_state(root: Path) -> str:
    """Commit, dirty flag, status and diff of the repository whose top folder is `root`."""

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, errors="replace")

    # An installed package may lie inside someone else's repository (a venv in a checkout): not ours.
    if shutil.which("git") is None or not (root / ".git").exists():
        return "not a git checkout\n"
    head = git("rev-parse", "HEAD")
    if head.returncode != 0:
        return f"no commit: {head.stderr.splitlines()[0]}\n"
    status = git("status", "--porcelain").stdout
    dirty = "yes" if status else "no"
    return f"commit {head.stdout.strip()}\ndirty {dirty}\n\n{status}\n{git('diff', 'HEAD').stdout}"


def _environment(argv: list[str]) -> str:
    import torch

    gpu_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(gpu_count)]
    packages = {f"{dist.name.lower().replace('_', '-')}=={dist.version}" for dist in distributions()}
    return "\n".join(
        [
            f"command: {shlex.join(argv)}",
            f"started: {time.strftime('%Y-%m-%dT%H:%M:%S%z')}",
            f"python: {platform.python_version()}",
            f"platform: {platform.platform()}",
            f"host: {platform.node()}",
            f"ranks: {os.environ.get('WORLD_SIZE', '1')}",
            f"cpus: {os.cpu_count()}",
            f"gpus: {', '.join(gpus) or 'none'}",
            "",
            *sorted(packages),
            "",
        ]
    )
