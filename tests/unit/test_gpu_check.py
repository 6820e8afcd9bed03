"""`gpu-check`: the runner on checks that fail, hang, die and lie; the records of all checks; the command."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_check_samples as samples
import psutil
import pytest
import torch

from megatron_aspo.cli import main
from megatron_aspo.commands.check_rollout import LIMITS
from megatron_aspo.config.import_path import import_object
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.tools.gpu_check import checks_loss, checks_vllm, command
from megatron_aspo.tools.gpu_check.records import Check, Lab, load_checks, planned_ends
from megatron_aspo.tools.gpu_check.runner import Result, run_checks

BOUNDS = {"error": (0.0, 1.0)}
CHECKS = load_checks()


def sample(name: str, gpus: int = 1, seconds: float = 60, after: str = "") -> Check:
    return Check(name, f"gpu_check_samples:{name.split()[0]}", seconds, BOUNDS, gpus, after)


def outcomes(checks: list[Check], folder: Path, gpus: int = 1) -> dict[str, Result]:
    names = [str(i) for i in range(gpus)]
    events = list(run_checks(checks, Lab(str(folder)), names, folder))
    results = {event.check.name: event for event in events if isinstance(event, Result)}
    started = [event.name for event in events if isinstance(event, Check)]
    assert started == [check.name for check in checks if results[check.name].status != "not run"]
    return results


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(samples.__file__).parent))
    monkeypatch.setenv("RANK", "1")  # of a launcher: only rank 0 would write its numbers


REASONS = {
    "passes": "",
    "raises": "exit code 1: RuntimeError: CUDA error: an illegal memory access",
    "refuses": "exit code 1: no model here",
    "exits": "exit code 3: ",
    "leaves": "returned no numbers: ",
    "is_killed": "ended by SIGKILL",
    "has_nan": "error is nan",
    "misses": "error is missing",
    "exceeds": "error is 2, not within 0 to 1",
    "is_no_table": "returned no numbers: ",
    "holds_words": "returned no numbers: ",
    "cannot_be_written": "exit code 1: TypeError: ",
}


def test_every_way_to_fail_is_one_line(tmp_path: Path) -> None:
    """Four processes at a time; each sees one GPU of its own."""
    results = outcomes([sample(name) for name in REASONS], tmp_path, 4)
    for name, reason in REASONS.items():
        assert results[name].reason.startswith(reason), name
        assert (results[name].status == "passed") == (not reason)
        assert len(str(results[name]).splitlines()) == 1
        json.dumps(results[name].record())
    assert results["passes"].numbers["gpus"] in range(4)


def test_a_hanging_check_ends_at_its_limit_with_its_children(tmp_path: Path) -> None:
    checks = [sample("hangs", seconds=4), sample("passes", after="hangs"), sample("passes 2", gpus=2)]
    start = time.monotonic()
    results = outcomes(checks, tmp_path)
    assert results["hangs"].reason.startswith("no end after 4 s; killed")
    assert results["passes"].status == "passed"
    assert results["passes 2"].reason == "needs 2 GPUs"
    assert 4 <= results["hangs"].seconds < time.monotonic() - start
    status = Path("/proc", (tmp_path / "child").read_text(), "status")
    assert not status.exists() or "State:\tZ" in status.read_text()  # nobody may have waited for it


def test_time_that_is_left_over_is_the_later_checks(tmp_path: Path) -> None:
    ends = planned_ends([sample("a", seconds=10), sample("b", 2, 20), sample("c", seconds=5, after="b")], 2)
    assert ends == {"a": 10, "b": 30, "c": 35}
    results = outcomes([sample("passes", seconds=60), sample("sleeps", seconds=0.1)], tmp_path)
    assert [result.status for result in results.values()] == ["passed", "passed"]


def test_the_checks_cover_the_suite_within_its_time() -> None:
    full = [check for check in CHECKS if check.name[0].isdigit()]
    numbers = [int(number) for check in full for number in check.numbers]
    assert set(numbers) == set(range(1, 31))
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    single = [check for check in full if check.gpus == 1]
    assert max(planned_ends(single, 1).values()) <= 9 * 60
    assert {int(n) for check in single for n in check.numbers} >= {*range(1, 21), 28}
    assert max(planned_ends(full, 8).values()) <= 15 * 60
    assert max(planned_ends([check for check in CHECKS if check.bare], 1).values()) <= 8 * 60
    for check in CHECKS:
        assert import_object(check.target, "lab")
        assert check.bounds
        assert all(low <= high for low, high in check.bounds.values())
        assert check.after in {"", *(other.name for other in full)}
        source = Path(str(sys.modules[check.target.partition(":")[0]].__file__)).read_text()
        for name in check.bounds:  # once in the bounds and once where the number is made
            end = re.sub("^(.*: |loss |grad norm )(?=.)", "", name)
            assert source.count(end) >= 2, name


def test_limits_of_the_sampler_are_those_of_check_rollout() -> None:
    for bounds, dtype in ((checks_vllm.BFLOAT16, "bfloat16"), (checks_vllm.FP8, "fp8")):
        assert tuple(high for _, high in bounds.values()) == LIMITS[dtype]


def test_without_a_gpu_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for start, words in ((main, ["gpu-check"]), (command.main, ["--bare"])):
        assert start([*words, "--out", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "no CUDA GPU here" in line
        assert "--cpu" in line
    assert main(["gpu-check", "--cpu", "--only", "99"]) == 2
    assert "--only=99" in capsys.readouterr().err


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """`megatron-aspo train examples/tiny.yaml`, which has two ranks, on a host with one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"), distributed(RunConfig(name="two")):
        pass


def test_a_signal_ends_the_checks_too(tmp_path: Path) -> None:
    """Otherwise the check of the moment keeps its GPU, and models stay in memory."""
    words = ["--cpu", "--only", "2", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "megatron_aspo.tools.gpu_check.command", *words]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("running")
        while not (started := psutil.Process(process.pid).children()):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert not psutil.wait_procs(started, timeout=10)[1]
    assert not [*tmp_path.glob("gpu-check-*"), *Path("/dev/shm").glob(f"gpu-check-{process.pid}-*")]


def test_the_command_writes_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-check", "--cpu", "--only", "2", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("passed   2 GEMMs")
    assert "1 passed, 0 failed, 0 not run" in out
    assert "running  2 GEMMs" in err
    (record,) = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert record["status"] == "passed"
    assert record["bounds"].keys() == record["numbers"].keys()


def test_a_nan_among_many_values_reaches_the_judge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A planted one, in one objective."""
    real, calls = checks_loss.fused_linear_policy_loss, []

    def broken(*arguments: Any, **options: Any) -> Any:
        out = real(*arguments, **options)
        calls.append(out)
        return replace(out, logprobs=out.logprobs * torch.nan) if len(calls) == 3 else out

    monkeypatch.setattr(checks_loss, "fused_linear_policy_loss", broken)
    numbers = checks_loss.fused_loss(Lab(str(tmp_path), "cpu"))
    assert len(calls) == numbers["losses"] == len(checks_loss.LOSSES)
    assert math.isnan(numbers["logprobs"])
    assert numbers["hidden"] < 1e-2
