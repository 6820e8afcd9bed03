"""Launching ranks: their environment, the rendezvous port, and the exit code if one ends early."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.ranks import launch


def test_a_taken_port_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", launch._free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(launch, "PORTS", range(port - 2, port + 3))
        ports = {launch._free_port() for _ in range(200)}
    assert port not in ports
    assert len(ports) >= 2


def test_no_ephemeral_port_is_chosen() -> None:
    """Another process could take such a port before rank 0 binds it. Concurrent launchers choose different ports."""
    ports = [launch._free_port() for _ in range(100)]
    assert 1024 <= min(ports) <= max(ports) < 32768  # where Linux's ephemeral ports begin
    assert len(set(ports)) > 90


@pytest.mark.parametrize(
    ("script", "capability"),
    [
        ("echo 9.0; echo 9.0", (9, 0)),
        ("echo 10.3", (10, 3)),
        ("echo '[N/A]'", None),
        ("echo No devices were found", None),
        ("exit 9", None),
    ],
)
def test_the_compute_capability_comes_from_nvidia_smi(
    script: str, capability: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert launch.compute_capability() == capability
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert launch.compute_capability() is None


@pytest.mark.parametrize(("preset", "connections"), [(None, "1"), ("8", "8")])
def test_ranks_start_with_the_environment_of_their_layout(
    preset: str | None,
    connections: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN")
    (tmp_path / "shows.py").write_text(f"import os\nprint(*(os.environ[name] for name in {names!r}))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in names:
        monkeypatch.delenv(name, raising=False)
    if preset is not None:
        monkeypatch.setenv(names[0], preset)
    environment = launch.rank_environment(ParallelConfig(tensor=2), (9, 0))
    assert launch.run_local("shows", [], 2, environment=environment) == 0
    assert capfd.readouterr().out == f"{connections} 16 16\n" * 2


@pytest.mark.parametrize("hint", ["do it again", ""])
def test_a_signal_that_ends_a_rank_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], hint: str
) -> None:
    (tmp_path / "victim.py").write_text(
        "import os, signal, time\nos.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(600)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launch.run_local("victim", [], 2, hint) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "rank 1 was ended by SIGSEGV" in line
    assert line.endswith(hint or "stopped too")


def join(*scripts: str, together: bool) -> int:
    """Exit code of ranks that run these scripts. With `together` all have exited before the launcher first polls."""
    processes = [subprocess.Popen(["sh", "-c", script]) for script in scripts]
    if together:
        for process in processes:
            process.wait()
    return launch._join(processes, "")


def test_the_first_failure_is_the_cause(capfd: pytest.CaptureFixture[str]) -> None:
    """A rank that lost its peer may also have exited before the launcher polls."""
    assert join("exit 1", "kill -KILL $$", together=True) == 1
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err
    assert join("exit 2", "sleep 1; kill -ABRT $$", together=False) == 2
    assert join("sleep 1; kill -ABRT $$", "exit 2", together=False) == 2
    assert capfd.readouterr().err == ""
