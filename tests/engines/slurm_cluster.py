"""A Slurm cluster of four nodes on this host, from Debian's packages, with all its state in one folder.

Each node declares 8 GPUs, which the scripts request; jobs that actually train request none.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_aspo.ranks.launch import _die_with_parent, _free_port

NODES = 4
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")

# Two partitions: jobs in `low` give way to those in `batch`. A requeued job waits for twice cred_expire.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={state}
SlurmdSpoolDir={state}/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/%n.log
PlugStackConfig={state}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=0
FirstJobId={first_job}
KillWait=10
PartitionName=batch Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=90
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=2000000 Gres=gpu:8\n"


def missing() -> str | None:
    """Reason why a cluster cannot run here, or None."""
    if os.getuid() != 0:
        return "a Slurm cluster needs root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge" if absent else None


class Cluster:
    """The Slurm daemons, from construction to `close`; they exit with this process."""

    def __init__(self, state: Path) -> None:
        self.state = state
        host = socket.gethostname().partition(".")[0]
        ports: set[int] = set()
        while len(ports) < NODES + 1:
            ports.add(_free_port())
        # Slurm derives the ranks' port from the job number. Other clusters on this host must get other numbers, also
        # one whose process started right after this one.
        text = CONFIG.format(state=state, host=host, port=ports.pop(), first_job=100 * (os.getpid() % 100) + 1)
        for number, port in enumerate(ports):
            text += NODE.format(name=f"node{number}", host=host, port=port)
        (state / "slurm.conf").write_text(text)
        (state / "plugstack.conf").touch()
        # Slurm requires device files, one for each GPU.
        for number in range(8):
            (state / f"gpu{number}").symlink_to("/dev/null")
        (state / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=node[0-{NODES - 1}] Name=gpu File={state}/gpu[0-7]\n"
        )
        (state / "munge.key").write_bytes(os.urandom(128))
        (state / "munge.key").chmod(0o400)
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(state / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        self._daemon(
            "munged", "--force", "--foreground", *(f"--{name}={self.state}/munge.{end}" for name, end in munge.items())
        )
        wait_until((self.state / "munge.socket").exists, 30, "munged")
        self._daemon("slurmctld", "-Dc")
        for number in range(NODES):
            self._daemon("slurmd", "-DN", f"node{number}")
        wait_until(self._is_up, 120, lambda: f"idle nodes\n{(self.state / 'slurmctld.log').read_text()}")

    def _daemon(self, *command: str) -> None:
        log = (self.state / "daemons.log").open("a")
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, preexec_fn=_die_with_parent)
        )

    def _is_up(self) -> bool:
        return self.call("sinfo", "-hN", "-pbatch", "-tidle", check=False).count("\n") == NODES

    def call(self, *command: str, check: bool = True) -> str:
        """Output of a command; with `check` a failing command raises."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def close(self) -> None:
        """End the jobs, then the daemons."""
        self.call("scancel", "--full", "--user=root", check=False)
        deadline = time.monotonic() + 60
        while self.call("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


class Job:
    """A batch job of one of the scripts in slurm/.

    Args:
        words: arguments of the script.
        flags: options of sbatch.
    """

    def __init__(self, cluster: Cluster, root: Path, name: str, words: list[str], flags: list[str]) -> None:
        self.cluster, self.name, self.run_dir = cluster, name, root / name
        self.output = root / f"{name}.out"
        command = ["sbatch", "--parsable", f"--job-name={name}", f"--output={self.output}"]
        script = ["slurm/aspo_32b.sh", f"output_dir={root}", *words]
        self.id = cluster.call(*command, *flags, *script).strip()

    def field(self, name: str) -> str:
        return self.cluster.field(self.id, name)

    @property
    def said(self) -> str:
        """Output of the batch script."""
        return self.output.read_text() if self.output.exists() else ""

    @property
    def exit_code(self) -> int:
        return int(self.field("ExitCode").partition(":")[0])

    def is_over(self) -> bool:
        return self.field("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def processes(self) -> list[psutil.Process]:
        """All Python processes of the run, on any node."""
        marks = {f"output_dir={self.run_dir.parent}", f"name={self.name}"}
        found: list[psutil.Process] = []
        for process in psutil.process_iter(["cmdline", "status"]):
            command = process.info["cmdline"] or []
            if "python" in "".join(command[:1]) and marks <= set(command) and process.info["status"] != "zombie":
                found.append(process)
        return found

    def finish(self, timeout: float = 400) -> None:
        """Wait until the job ends, and check that it leaves no process behind."""
        wait_until(self.is_over, timeout, lambda: f"the end of {self.name}\n{self.said}")
        wait_until(lambda: not self.processes(), 30, f"the end of all processes of {self.name}")
        wait_until(lambda: not self.cluster.call("squeue", "-h", "-j", self.id), 30, "an empty queue")


def wait_until(condition: Callable[[], object], timeout: float, what: str | Callable[[], str]) -> None:
    """Wait for a condition; `what` is the error message on timeout."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:g} s for {what() if callable(what) else what}"
        time.sleep(0.1)
