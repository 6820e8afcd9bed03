"""Trackers with the real packages, offline: their records are read back, also of a resumed run; faults stop no run."""

import json
import os
import pty
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import wandb
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_aspo.config.journal import JournalConfig
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.journal.journal import Journal
from megatron_aspo.journal.trackers import Tracker, check_trackers

RESPONSE = {"text": "1+1=2", "score": 1.0, "reward": 0.5, "advantage": -0.25, "finish_reason": "stop"} | {
    "versions": [[4, 3], [5, 1]],
    "tokens": ["1+", "1", "=2", "<eos>"],
}
TURNS = RESPONSE | {
    "text": "32",
    "score": 0.0,
    "versions": [[4, 2], [-1, 1], [5, 1]],
    "tokens": ["3", ".", "no: ", "2"],
}
GROUP = {"step": 2, "group": 7, "prompt": "1+1=", "responses": [RESPONSE, TURNS]}
COLUMNS = ["group", "prompt", "response", "score", "reward", "advantage", "finish_reason"]
ROWS = [
    [7, "1+1=", "1+1=2", 1.0, 0.5, -0.25, "stop"],
    [7, "1+1=", "3.<observation>no: </observation>2", 0.0, 0.5, -0.25, "stop"],
]


def config_of(folder: Path, *trackers: str, clip: float = 0.2) -> RunConfig:
    loss = PolicyLossConfig(clip_high=clip)
    return RunConfig(name="mine", output_dir=str(folder), loss=loss, journal=JournalConfig(trackers=trackers))


def record(config: RunConfig, resume_step: int | None, steps: Sequence[int]) -> None:
    """One attempt of a run: its steps, an evaluation, samples in step 2, and the report."""
    with Journal(config, ["train"], resume_step, is_rank_0=True) as journal:
        journal.record("warmup", 1, 1, {"loss/nll": 2.0})
        for step in steps:
            journal.record("train", step, 4, {"reward/mean": step / 8, "optimizer/grad_norm": float("nan")})
        journal.record("eval", steps[-1], 4, {"eval/accuracy": 0.5})
        if 2 in steps:
            journal.record_samples(2, [GROUP])
        journal.record_report(lambda folders: write_page(folders[0]))


def write_page(folder: Path) -> Path:
    (folder / "report.html").write_text("<p>page</p>")
    return folder / "report.html"


def wandb_records(folder: Path) -> list[Any]:
    """The records of a finished offline run in a folder. Weights & Biases' own process writes the last ones a moment
    after `finish` has returned."""
    (path,) = folder.glob("*.wandb")
    deadline, records = time.monotonic() + 60, list[Any]()
    while not any(r.WhichOneof("record_type") == "exit" for r in records):
        assert time.monotonic() < deadline, f"{path} has {len(records)} records, none of which is an exit"
        time.sleep(0.05)
        records = parse_records(path.read_bytes())
    return records


def parse_records(data: bytes) -> list[Any]:
    """The whole records of a file so far: LevelDB's log format behind 7 bytes, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    at, part = 7, b""
    assert data[:4] == b":W&B"
    records: list[Any] = []
    while at + 7 <= len(data):
        if (room := -at % 32768) and room < 7:  # too little for a header
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            break
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(part))  # pyright: ignore[reportAttributeAccessIssue]
            part = b""
    return records


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    record(config_of(tmp_path, "wandb"), None, [1, 2, 3])
    record(config_of(tmp_path, "wandb", clip=0.3), 2, [3, 4])
    first, second = (wandb_records(path) for path in sorted((tmp_path / "mine" / "wandb").glob("offline-run-*")))
    ids = {r.run.run_id for r in [*first, *second] if r.WhichOneof("record_type") == "run"}
    assert ids == {(tmp_path / "mine" / "wandb" / "run_id.txt").read_text().strip()}

    for records, steps, clip in ((first, [1, 2, 3], 0.2), (second, [3, 4], 0.3)):
        (run,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
        assert (run.project, run.display_name) == ("megatron_aspo", "mine")
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["loss"]["clip_high"] == clip
        rows = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
            for r in records
            if r.WhichOneof("record_type") == "history"
        ]
        rewards = [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row]
        assert rewards == [(step, step / 8) for step in steps]
        assert [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row] == [(steps[-1], 0.5)]
        assert not [row for row in rows if "loss/nll" in row or "optimizer/grad_norm" in row]
        axes = {(r.metric.name or r.metric.glob_name, r.metric.step_metric) for r in records if r.HasField("metric")}
        assert ("*", "step") in axes
        artifacts = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
        assert {"report"} <= {artifact.type for artifact in artifacts}
        assert not [r for r in records if r.WhichOneof("record_type") == "preempting"]
        assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [0]
    (table,) = (tmp_path / "mine" / "wandb").glob("offline-run-*/files/media/table/*.json")
    read = json.loads(table.read_text())
    assert (read["columns"], read["data"]) == (COLUMNS, ROWS)


def test_weights_and_biases_never_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a server at the end of a run, nor at a terminal for a key. A run to be resumed is preempted."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Journal(config_of(tmp_path, "wandb"), [], None, is_rank_0=True) as journal:
        assert wandb.run is not None
        assert wandb.run.settings.finish_timeout == 120
        journal.stop("stopped by a signal")
    (folder,) = (tmp_path / "mine" / "wandb").glob("offline-run-*")
    records = wandb_records(folder)
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [1]
    assert [r for r in records if r.WhichOneof("record_type") == "preempting"]

    here, there = pty.openpty()
    code = (
        "from megatron_aspo.journal.trackers import JournalConfig, RunConfig, Trackers; "
        "Trackers(RunConfig('mine', output_dir='.', journal=JournalConfig(trackers=('wandb',))), None)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | {
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "WANDB_BASE_URL": "http://127.0.0.1:9",  # nothing listens
        "TERM": "xterm",
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdin=there, stdout=there, stderr=there, timeout=300)
    assert done.returncode == 0
    told = os.read(here, 65536).decode().split()
    line = "the run goes on without journal.trackers=wandb: UserError: no API key; set WANDB_API_KEY"
    assert line in " ".join(told)


def test_mlflow_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRACKING_URI", "HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    record(config_of(tmp_path, "mlflow"), None, [1, 2, 3])
    record(config_of(tmp_path, "mlflow", clip=0.3), 2, [3, 4])
    limits = (MLFLOW_HTTP_REQUEST_TIMEOUT.get(), MLFLOW_HTTP_REQUEST_MAX_RETRIES.get())
    assert limits == (10, 2)  # seconds of each of three attempts
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("megatron_aspo")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])  # the resumed attempt goes on in it
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["loss.clip_high"] == "0.2"
    assert run.data.params["data.path"] == ""
    assert len(run.data.params) > 120
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert [(m.step, m.value) for m in history] == [(1, 0.125), (2, 0.25), (3, 0.375), (3, 0.375), (4, 0.5)]
    assert set(run.data.metrics) == {"reward/mean", "eval/accuracy"}
    files = Path(client.download_artifacts(run.info.run_id, ""))
    assert "clip_high: 0.3" in (files / "config.yaml").read_text()
    assert json.loads((files / "samples/step_000002.json").read_text()) == {"columns": COLUMNS, "data": ROWS}
    assert (files / "report.html").read_text() == "<p>page</p>"
    with pytest.raises(ZeroDivisionError), Journal(config_of(tmp_path, "mlflow"), [], 3, is_rank_0=True):
        raise ZeroDivisionError
    assert client.get_run(run.info.run_id).info.status == "FAILED"
    with Journal(config_of(tmp_path, "mlflow"), [], 3, is_rank_0=True) as journal:
        journal.stop("stopped by a signal")
    assert client.get_run(run.info.run_id).info.status == "KILLED"
    record(config_of(tmp_path, "mlflow"), None, [1])  # a new run
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert (tmp_path / "mine" / "mlflow.1" / "run_id.txt").read_text().strip() == run.info.run_id


def test_tensorboard_has_configuration_and_samples(tmp_path: Path) -> None:
    record(config_of(tmp_path, "tensorboard"), None, [1, 2])
    events: Any = EventAccumulator(str(tmp_path / "mine" / "tensorboard"))
    events.Reload()
    (samples,) = events.Tensors("samples/text_summary")
    assert samples.step == 2
    assert json.loads(samples.tensor_proto.string_val[0]) == [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    (config,) = events.Tensors("config/text_summary")
    assert json.loads(config.tensor_proto.string_val[0])["loss"]["clip_high"] == 0.2


class Mine(Tracker):
    """A user's tracker, which fails at its third record."""

    seen: list[tuple[int, dict[str, float]]]

    def __init__(self, config: RunConfig, resume_step: int | None) -> None:
        Mine.seen = [(resume_step or 0, {"name": len(config.name)})]

    def log(self, step: int, values: Mapping[str, float], time: float) -> None:
        assert time > 1.7e9
        Mine.seen.append((step, dict(values)))
        if len(Mine.seen) == 4:
            raise ConnectionError("no route\nto the host")


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(config_of(tmp_path, "test_trackers:Mine", "tensorboard"), None, [1, 2, 3, 4])
    captured = capsys.readouterr()
    line = "the run goes on without journal.trackers=test_trackers:Mine: ConnectionError: no route"
    assert captured.err.splitlines() == [f"warning: {line}"]
    assert Mine.seen == [(0, {"name": 4}), *((step, {"reward/mean": step / 8}) for step in (1, 2, 3))]
    events: Any = EventAccumulator(str(tmp_path / "mine" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4]
    assert f"report: {tmp_path / 'mine' / 'report.html'}" in captured.out


def test_other_ranks_have_no_tracker(tmp_path: Path) -> None:
    Mine.seen = []
    with Journal(config_of(tmp_path, "test_trackers:Mine"), [], None, is_rank_0=False) as journal:
        journal.record("train", 1, 1, {"reward/mean": 0.5})
        journal.record_samples(1, [GROUP])
    assert Mine.seen == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("tensorboard", "tensorboard"), ("wandb", "'megatron-aspo[wandb]'"), ("mlflow", "'megatron-aspo[mlflow]'")],
)
def test_a_missing_package(
    tmp_path: Path, name: str, wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [module for module in sys.modules if name in module.split(".")]:  # and torch.utils.tensorboard
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # Python's mark of a module that cannot be imported
    config = config_of(tmp_path, name)
    with Journal(config, [], None, is_rank_0=True) as journal:
        journal.record("train", 1, 1, {"reward/mean": 0.5})
    line = f"the run goes on without journal.trackers={name}: it is not installed: pip install {wanted}"
    assert capsys.readouterr().err.splitlines() == [f"warning: {line}"]


def test_a_server_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    record(config_of(tmp_path, "mlflow"), None, [1])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: the run"))
    assert line.startswith("warning: the run goes on without journal.trackers=mlflow: MlflowException: API request")


def test_an_import_path_that_leads_nowhere() -> None:
    check_trackers(JournalConfig(trackers=("wandb", "test_trackers:Mine")))
    with pytest.raises(UserError, match="cannot import test_trackers:Yours"):
        check_trackers(JournalConfig(trackers=("test_trackers:Yours",)))
    assert wandb.run is None
