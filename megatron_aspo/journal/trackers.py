"""Experiment trackers: further places for a run's configuration, metrics, samples and report."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from megatron_aspo.batch import OBSERVATION
from megatron_aspo.config.import_path import import_object
from megatron_aspo.config.journal import TRACKERS, JournalConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.journal.log import Record

Ending = Literal["finished", "stopped", "failed"]
"""How a run, or this attempt, ends: after its last step, by a signal and to be resumed, or by an error."""

PROJECT = "megatron_aspo"
"""Project of Weights & Biases, or experiment of MLflow, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names one."""

FINISH_SECONDS = 120.0
"""Longest wait for uploads to Weights & Biases at the end, unless WANDB_FINISH_TIMEOUT sets another."""


class Tracker:
    """Receives what a run records, on rank 0 only.

    It is made of the configuration and of the step that a resumed run continues from, None in a new run. It may keep
    files in `config.run_dir / NAME`; a built-in one's are set aside when a run starts anew.
    """

    def __init__(self, config: RunConfig, resume_step: int | None) -> None: ...

    def log(self, step: int, values: Mapping[str, float], time: float) -> None:
        """The finite metrics of a record after the warm-up. time: unix seconds."""

    def log_samples(self, step: int, groups: Sequence[Record]) -> None:
        """The step's lines of `samples.jsonl`."""

    def log_file(self, path: Path) -> None:
        """The report, at the end of a run."""

    def close(self, ending: Ending) -> None:
        """The end of the run, or of this attempt."""


class Trackers:
    """The trackers of a run. One that raises an exception is named in a line, and left out from then on."""

    def __init__(self, config: RunConfig, resume_step: int | None) -> None:
        self._open: dict[str, Tracker] = {}
        for name in config.journal.trackers:
            with self._guard(name):
                self._open[name] = (_BUILT_IN.get(name) or import_tracker(name))(config, resume_step)

    def each(self, method: str, *arguments: Any) -> None:
        """Call a method of `Tracker` on all that still work."""
        for name, tracker in list(self._open.items()):
            with self._guard(name):
                getattr(tracker, method)(*arguments)

    @contextlib.contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises: it must not end the run
            self._open.pop(name, None)
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"
            if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == name:
                wanted = name if name == "tensorboard" else f"'megatron-aspo[{name}]'"  # an extra
                reason = f"it is not installed: pip install {wanted}"
            print(f"warning: the run goes on without journal.trackers={name}: {reason}", file=sys.stderr, flush=True)


def import_tracker(path: str) -> Callable[[RunConfig, int | None], Any]:
    """The tracker at an import path. Raises UserError unless it takes the two arguments."""
    return import_object(path, "config", "resume_step")


def check_trackers(config: JournalConfig) -> None:
    """Raise UserError for an import path that leads nowhere. A package that is not installed is no error."""
    for name in config.trackers:
        if name not in TRACKERS:
            import_tracker(name)


class TensorBoard(Tracker):
    """Event files in the run's folder. TensorBoard hides the metrics of steps that a resumed run repeats."""

    def __init__(self, config: RunConfig, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=purge_step)
        self._writer.add_text("config", _code(asdict(config)))

    def log(self, step: int, values: Mapping[str, float], time: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time)
        self._writer.flush()

    def log_samples(self, step: int, groups: Sequence[Record]) -> None:
        rows = [dict(zip(_COLUMNS, row, strict=True)) for row in _rows(groups)]
        self._writer.add_text("samples", _code(rows), step)

    def close(self, ending: Ending) -> None:
        self._writer.close()


class WandB(Tracker):
    """A run of Weights & Biases, also offline (WANDB_MODE=offline). Its environment variables apply."""

    def __init__(self, config: RunConfig, resume_step: int | None) -> None:
        import wandb

        self._wandb = wandb
        if not wandb.login(prompt=False, verify=False) and wandb.setup().settings.mode == "online":
            raise UserError("no API key; set WANDB_API_KEY, or WANDB_MODE=offline, or run wandb login")
        folder = config.run_dir / "wandb"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=config.name,
            id=_known_run(folder, resume_step),
            resume="allow",
            config=_plain(asdict(config)),
            dir=str(config.run_dir),
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",  # else it takes over the rank's output
                # By default a server that is away holds up the end of the run for ever. Files stay for `wandb sync`.
                finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)),
            ),
        )
        _keep_run(folder, self._run.id)
        # Weights & Biases' own step can neither go back, as in a resumed run, nor be equal in two records.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float], time: float) -> None:
        self._run.log({**values, "step": step})

    def log_samples(self, step: int, groups: Sequence[Record]) -> None:
        table = self._wandb.Table(columns=list(_COLUMNS), data=_rows(groups))
        self._run.log({"samples": table, "step": step})

    def log_file(self, path: Path) -> None:
        artifact = self._wandb.Artifact(f"report-{self._run.id}", type="report")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self, ending: Ending) -> None:
        if ending == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=int(ending != "finished"))


class MLflow(Tracker):
    """A run of MLflow, at MLFLOW_TRACKING_URI; without it in files of `output_dir/mlruns`."""

    def __init__(self, config: RunConfig, resume_step: int | None) -> None:
        # By default there are eight attempts of two minutes, in which training waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the database of its default needs more packages
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        store = os.environ.get("MLFLOW_TRACKING_URI") or (Path(config.output_dir) / "mlruns").absolute().as_uri()
        self._metric, self._client = Metric, MlflowClient(store)
        folder = config.run_dir / "mlflow"
        known = _known_run(folder, resume_step)
        if known is None:
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(project)
            number = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
            known = self._client.create_run(number, run_name=config.name).info.run_id
            _keep_run(folder, known)
            params = [Param(name, text[:6000]) for name, text in _leaves(_plain(asdict(config)))]
            for first in range(0, len(params), 100):  # MLflow's limits
                self._client.log_batch(known, params=params[first : first + 100])
        else:
            self._client.update_run(known, status="RUNNING")
        self._id = known
        self._client.log_dict(self._id, _plain(asdict(config)), "config.yaml")

    def log(self, step: int, values: Mapping[str, float], time: float) -> None:
        metrics = [self._metric(name, value, int(1000 * time), step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def log_samples(self, step: int, groups: Sequence[Record]) -> None:
        table = {"columns": list(_COLUMNS), "data": _rows(groups)}  # MLflow's form of a table
        self._client.log_text(self._id, json.dumps(table), f"samples/step_{step:06d}.json")

    def log_file(self, path: Path) -> None:
        self._client.log_artifact(self._id, str(path))

    def close(self, ending: Ending) -> None:
        self._client.set_terminated(self._id, "KILLED" if ending == "stopped" else ending.upper())


_BUILT_IN = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}

_COLUMNS = ("group", "prompt", "response", "score", "reward", "advantage", "finish_reason")
"""Columns of the table of samples. The tokens' numbers stay in `samples.jsonl`."""


def _rows(groups: Sequence[Record]) -> list[list[Any]]:
    """A row for each response."""
    return [
        [group["group"], group["prompt"], _text(response), *(response[name] for name in _COLUMNS[3:])]
        for group in groups
        for response in group["responses"]
    ]


def _text(response: Record) -> str:
    """A response's text. Several turns are joined with the observations between them, which are marked."""
    if all(version != OBSERVATION for version, _ in response["versions"]):
        return response["text"]
    pieces = iter(response["tokens"])
    parts = [(version, "".join(islice(pieces, count))) for version, count in response["versions"]]
    return "".join(f"<observation>{p}</observation>" if version == OBSERVATION else p for version, p in parts)


def _known_run(folder: Path, resume_step: int | None) -> str | None:
    """The tracker's name of the run that a resumed run continues, if it had this tracker."""
    path = folder / "run_id.txt"
    return path.read_text().strip() if resume_step is not None and path.is_file() else None


def _keep_run(folder: Path, run_id: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run_id.txt").write_text(f"{run_id}\n")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the types of JSON."""
    return json.loads(json.dumps(config, default=str))


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names of the settings, such as loss.objective, with their values as text."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


def _code(value: Any) -> str:
    """Markdown of a block of JSON."""
    return "\n".join(
        f"    {line}" for line in json.dumps(value, indent=1, default=str, ensure_ascii=False).splitlines()
    )
