"""Sandboxes for untrusted programs: bubblewrap around the harness (`inside/harness.py`).

A sandbox holds the standard library of this Python, read-only, and the libraries that it links to. It has no other
file, no network and no process of the host. The harness leaves programs the system calls of `syscalls`, and limits
memory, CPU time, threads and output. The backend "subprocess" is the harness alone.
"""

from __future__ import annotations

import compileall
import functools
import json
import os
import re
import select
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, Self

from megatron_aspo.config.rewards import CodeRewardConfig
from megatron_aspo.rewards.processes import JudgePool, kill
from megatron_aspo.rewards.programs.syscalls import seccomp_filter

_PACKAGE = "megatron_aspo/rewards/programs/inside"
_ENVIRONMENT = ("PYTHONHASHSEED=0", "PYTHONUTF8=1", "PYTHONDONTWRITEBYTECODE=1")
_DESCRIPTORS = 64
_WALL = 5
"""Ratio of the wall-clock limit, for programs that wait, to the CPU limit, which a busy machine does not change."""
_START_SECONDS = 60


class Sandbox:
    """A sandbox, which runs a program any number of times, each time in a new process.

    Args:
        channel: descriptors that the sandbox takes over, to read requests and to write replies.
    """

    def __init__(self, pool: JudgePool, config: CodeRewardConfig, channel: tuple[int, ...] = ()) -> None:
        self._pool = pool
        self._process = pool.start(_command(config.backend), stderr=subprocess.PIPE, pass_fds=channel)
        self._channel = channel
        self._limits = {
            "memory": config.memory_mib << 20,
            "output": config.output_kib << 10,
            "descriptors": _DESCRIPTORS,
            # Two more run beside the program in a sandbox. Outside, all of the user's would count.
            "tasks": config.threads + 2 if config.backend == "bubblewrap" else None,
        }

    def start(self, job: dict[str, Any], seconds: int, deadline: float) -> float:
        """Send a job with a limit of CPU time, and return before it ends.

        Returns:
            Limit of wall-clock time in seconds, at most to the deadline of `time.monotonic`.
        """
        wall = max(0.0, min(_WALL * seconds, deadline - time.monotonic()))
        limits = self._limits | {"seconds": seconds}
        shared = {"channel": self._channel, "limits": limits, "wall_seconds": wall, "filter": seccomp_filter().hex()}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(shared | job).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise OSError(self._last_words()) from None
        return wall

    def reply(self, seconds: float) -> dict[str, Any]:
        """The result of the job that was started (`harness.run`).

        Raises:
            TimeoutError: it takes longer.
            OSError: the sandbox has ended.
        """
        assert self._process.stdout is not None
        poll = select.poll()  # select takes no descriptor above 1023, which a trainer may have
        poll.register(self._process.stdout, select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise TimeoutError("no reply")
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise OSError(self._last_words())
        return json.loads(line)

    def run(self, job: dict[str, Any], seconds: int, deadline: float) -> dict[str, Any]:
        return self.reply(self.start(job, seconds, deadline) + _START_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.end(self._process)  # bubblewrap's first process inside dies with it, and takes along all others

    def _last_words(self) -> str:
        kill(self._process)
        lines = self._process.communicate()[1].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with code {self._process.returncode}"


@functools.cache
def _command(backend: str) -> list[str]:
    """The harness, in bubblewrap with the file system and namespaces of a sandbox.

    Raises:
        OSError: ldd, one of the C library's tools, is missing.
    """
    root = backend == "bubblewrap" and os.geteuid() == 0
    start = ("-S", "-s", "-P", "-c", f"from {_PACKAGE.replace('/', '.')}.harness import main; main({root})")
    first = ("nice", "-n", "5")  # the trainer's processes come first
    if backend == "subprocess":
        path = f"PYTHONPATH={Path(__file__).parents[3]}"
        return [*first, "env", "-i", path, *_ENVIRONMENT, sys.executable, *start]
    arguments = [*first, "bwrap", "--die-with-parent", "--new-session", "--clearenv"]
    arguments += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    arguments += ["--hostname", "sandbox", "--cap-drop", "ALL"]
    # The files may be open to root alone. Once they are bound, the harness goes on as nobody.
    arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else ["--unshare-user"]
    library = f"/python/lib/python{sys.version_info.major}.{sys.version_info.minor}"
    stdlib = Path(sysconfig.get_path("stdlib"))
    package = Path("/harness", _PACKAGE)
    for folder in ("/python", "/python/bin", "/python/lib", "/lib", "/lib64", *reversed(package.parents[:-1])):
        arguments += ["--perms", "0755", "--dir", str(folder)]  # by default they are closed to nobody
    inside = Path(__file__).parent / "inside"
    compileall.compile_dir(inside, quiet=2)  # once, not in every sandbox; a failure to write it does not matter
    arguments += ["--ro-bind", os.path.realpath(sys.executable), "/python/bin/python3"]
    arguments += ["--ro-bind", str(stdlib), library]
    arguments += ["--ro-bind", str(inside), str(package)]
    for packages in ("site-packages", "dist-packages"):  # packages may hold answers
        if (stdlib / packages).is_dir():
            arguments += ["--tmpfs", f"{library}/{packages}", "--remount-ro", f"{library}/{packages}"]
    for source, target in _shared_libraries(stdlib).items():
        arguments += ["--ro-bind", source, target]
    arguments += ["--remount-ro", "/", "--chdir", "/"]
    for variable in ("PYTHONHOME=/python", "PYTHONPATH=/harness", "LD_LIBRARY_PATH=/lib", *_ENVIRONMENT):
        arguments += ["--setenv", *variable.split("=")]
    return [*arguments, "--", "/python/bin/python3", *start]


def _shared_libraries(stdlib: Path) -> dict[str, str]:
    """Libraries that Python and its standard library link to -> path in the sandbox: the loader's own, else /lib."""
    files = [os.path.realpath(sys.executable), *map(str, (stdlib / "lib-dynload").glob("*.so"))]
    listing = subprocess.run(["ldd", *files], capture_output=True, text=True).stdout
    libraries = {path: f"/lib/{name}" for name, path in re.findall(r"^\s+(\S+) => (/\S+) \(", listing, re.MULTILINE)}
    return libraries | {path: path for path in re.findall(r"^\s+(/\S+) \(", listing, re.MULTILINE)}
