"""Where the ranks of a host meet, and what is said when a signal ends one."""

import socket
import subprocess
from pathlib import Path

import pytest

from megatron_aspo import launch


def test_a_port_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", launch._free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(launch, "PORTS", range(port - 2, port + 3))
        found = {launch._free_port() for _ in range(200)}
    assert port not in found
    assert len(found) >= 2


def test_no_port_that_the_system_hands_out() -> None:
    """Such a port could be gone when rank 0 wants it. Launchers that look at the same time find others."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first, _ = map(int, file.read().split())
    found = [launch._free_port() for _ in range(100)]
    if first < 20000:
        pytest.skip(f"this system hands out ports from {first} on")
    assert max(found) < first
    assert len(set(found)) > 90


@pytest.mark.parametrize(("hint", "end"), [("do it again", "; do it again"), ("", "")])
def test_a_rank_that_a_signal_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], hint: str, end: str
) -> None:
    (tmp_path / "victim.py").write_text(
        "import os, signal, time\nos.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(600)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launch.run_local("victim", [], 2, hint) == 1
    told = f"megatron-aspo: rank 1 was ended by SIGSEGV; the others are stopped too{end}\n"
    assert capfd.readouterr().err == told


def joined(*scripts: str, together: bool) -> int:
    """The exit code of ranks that are these scripts and, where `together`, have all ended before the first look."""
    processes = [subprocess.Popen(["sh", "-c", script]) for script in scripts]
    if together:
        for process in processes:
            process.wait()
    return launch._join(processes, "do it again")


def test_a_rank_that_ended_of_anothers_death_is_not_the_cause(capfd: pytest.CaptureFixture[str]) -> None:
    """Its peer is gone, it says so and ends, before the launcher looks."""
    assert joined("exit 1", "kill -KILL $$", together=True) == 1
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err
    assert joined("exit 2", "sleep 1; kill -ABRT $$", together=False) == 2
    assert joined("sleep 1; kill -ABRT $$", "exit 2", together=False) == 2
    assert capfd.readouterr().err == ""
