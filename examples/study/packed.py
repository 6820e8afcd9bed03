"""Metrics of finished runs, one compressed file a run: examples/study/results/BLOCK/NAME.json.xz.

A file holds a JSON object: `commit`, `dirty` (whether the checkout had uncommitted changes), `marks` (of the claims and
the design that the run was begun under), `error` (which ended it, or null), `settings` (sections of the run's
config.yaml), and `train` and `eval`, tables of columns by metric name. Numbers have six significant digits; null stands
for a metric that a step lacks.
"""

from __future__ import annotations

import json
import lzma
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from design import BLOCKS, MARKS_FILE, PILOTS, Key, faults, runs
from numpy.typing import NDArray
from omegaconf import OmegaConf

from megatron_aspo.errors import UserError
from megatron_aspo.journal.folder import CONFIG_FILE
from megatron_aspo.journal.log import METRICS_FILE, Record, read_metrics

RESULTS = Path(__file__).parent / "results"
SUFFIX = ".json.xz"
LEFT_OUT = ("phase", "time", "rollout/tokens_per_second", "rollout/repetition_words")
"""Prefixes of columns that are not kept: times, and words in a task that has none."""

KEPT = ("time/step", "time/old_logprobs", "time/mismatch")
"""Columns kept though their prefix is left out: the pass that an anchor at the sampler saves, or makes to measure."""

SECTIONS = ("seed", "model", "data", "rollout", "loss", "optimizer", "train", "warmup", "eval")
"""Sections of config.yaml that are kept: all that results depend on."""

NAME = re.compile(r"(?P<arm>[a-z_0-9]+)-lr(?P<lr>[0-9.e+-]+)-k(?P<k>\d+)-seed(?P<seed>\d+)")

Columns = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Metrics:
    """A run that is over. `train` and `evaluation` map a metric to its values by step, with `step` among them.

    Attributes:
        error: what ended the run before its last step. Its last values then stand for the steps that it lacks.
    """

    key: Key
    steps: int
    epochs: int
    train: Columns
    evaluation: Columns
    commit: str = ""
    dirty: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Packed:
    """The packed runs that count, and a line for each other one, which says why it does not."""

    runs: dict[Key, Metrics]
    refused: list[str]


def key_of(block: str, name: str) -> Key | None:
    """Parse a run's name; None for a name of another form."""
    match = NAME.fullmatch(name)
    return match and Key(block, match["arm"], float(match["lr"]), int(match["k"]), int(match["seed"]))


def packed_file(key: Key, results: Path = RESULTS) -> Path:
    """The file of a run's packed metrics."""
    return results / key.block / f"{key.name}{SUFFIX}"


def pack(folder: Path, results: Path = RESULTS) -> list[Path]:
    """Write a file for each run below `folder` that is over and has none. Return the new files.

    Over are complete runs, and those that an error has ended after their first step. Others are left for later, and
    with one of a counted seed the other runs of its seed and block: these are compared, so they need one warm start,
    which another kind of CPU makes a little differently. Existing files are never rewritten.
    """
    contents: dict[Key, dict[str, Any]] = {}
    for made_under in sorted(folder.glob(f"*/*/{MARKS_FILE}")):
        run = made_under.parent
        key = key_of(run.parent.name, run.name)
        if key and key.block in BLOCKS and (run / METRICS_FILE).is_file() and (content := _content(run)):
            contents[key] = content
    written: list[Path] = []
    for key, content in contents.items():
        compared = {run.key for run in runs(key.block, [key.seed])}
        path = packed_file(key, results)
        if path.exists() or (key.seed not in PILOTS and not compared <= contents.keys()):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(json.dumps(content, separators=(",", ":")).encode(), preset=9))
        written.append(path)
    return written


def _content(run: Path) -> dict[str, Any] | None:
    """The content of a run's packed file; None if the run is not over."""
    settings: Any = OmegaConf.to_container(OmegaConf.load(run / CONFIG_FILE))
    made: dict[str, Any] = json.loads((run / MARKS_FILE).read_text(encoding="utf-8"))
    error = made.pop("error")
    by_phase = {phase: [r for r in read_metrics(run) if r["phase"] == phase] for phase in ("train", "eval")}
    complete = any(r["step"] == settings["train"]["steps"] for r in by_phase["eval"])
    if not complete and not (error and by_phase["train"]):
        return None
    commit, _, rest = (run / "git.txt").read_text(encoding="utf-8").partition("\n")
    return {
        "commit": commit.removeprefix("commit "),
        "dirty": rest.startswith("dirty yes"),
        "marks": made,
        "error": None if complete else error,
        "settings": {name: settings[name] for name in SECTIONS},
        **{phase: _columns(records) for phase, records in by_phase.items()},
    }


def _columns(records: Sequence[Record]) -> dict[str, list[float | None]]:
    names = sorted({name for record in records for name in record if name in KEPT or not name.startswith(LEFT_OUT)})
    return {name: [_rounded(record.get(name)) for record in records] for name in names}


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def load(results: Path = RESULTS) -> Packed:
    """Return the packed runs that were made by the present claims and design."""
    found = Packed({}, [])
    for path in sorted(results.glob(f"*/*{SUFFIX}")):
        key = key_of(path.parent.name, path.name.removesuffix(SUFFIX))
        if key is None:
            raise UserError(f"{path} is not named ARM-lrLR-kK-seedSEED{SUFFIX}; move it out of the folder")
        run, why_not = read(path, key)
        if why_not:
            found.refused.append(f"{key.block}/{key.name} does not count: {'; '.join(why_not)}")
        else:
            found.runs[key] = run
    return found


def read(path: Path, key: Key) -> tuple[Metrics, list[str]]:
    """Read a packed run, and why it does not count; UserError if the file is damaged."""
    try:
        content = json.loads(lzma.decompress(path.read_bytes()))
        settings = content["settings"]["train"]
        train, evaluation = (
            {name: np.array([math.nan if v is None else v for v in values]) for name, values in content[phase].items()}
            for phase in ("train", "eval")
        )
        origin = {name: content[name] for name in ("commit", "dirty", "error")}
        made_under = {name: content["marks"][name] for name in ("claims", "design")}
    except (lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and pack the run again") from None
    if origin["error"]:
        train = continued(train, settings["steps"])
    run = Metrics(key, settings["steps"], settings["epochs"], train, evaluation, **origin)
    return run, list(faults(key, content["settings"], made_under))


def continued(train: Columns, steps: int) -> Columns:
    """Return the columns up to `steps`: each metric keeps its last known value."""
    lacking = np.arange(train["step"][-1] + 1, steps + 1)
    longer: Columns = {"step": np.concatenate([train["step"], lacking])}
    for name, values in train.items():
        if name != "step":
            known = values[~np.isnan(values)]
            last = known[-1] if len(known) else math.nan
            longer[name] = np.concatenate([values, np.full(len(lacking), last)])
    return longer
