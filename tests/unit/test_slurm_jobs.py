"""slurm/body.sh as a job, with stand-ins for Slurm's programs: srun plays a script, the others note their calls."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SRUN = """#!/bin/bash
save() { mkdir -p $RUNS/mine/checkpoints/$1 && sleep 0.1 && echo {} >$RUNS/mine/checkpoints/$1/meta.json; }
case $* in
  *node_check*)
    touch $LOGS/rank.env
    [[ ! -f $STATE/check ]] || source $STATE/check
    ;;
  *)
    echo "$SRUN_CPUS_PER_TASK $PYTHONHASHSEED ${*: -1}" >>$STATE/steps
    source <(sed -n "$(wc -l <$STATE/steps)p" $STATE/plan)
    ;;
esac
"""
OTHERS = """#!/bin/bash
call="$(basename $0) $*" fails=$STATE/fails
echo "$call" >>$STATE/calls
[[ ! -s $fails || $call != "$(head -n 1 $fails)"* ]] || { sed -i 1d $fails && exit 1; }
case $call in
  *"show job"*) echo "JobId=7 EndTime=$(date -d "@$(($(date +%s) + 34))" +%FT%T) ExcNodeList=(null)" ;;
  *"show hostnames"*) printf 'node%d\\n' 0 1 2 3 ;;
  *"show node"*) echo " NodeAddr=127.0.0.1 " ;;
  *"scontrol requeue 7"*) [[ -f $fails ]] || kill -TERM $PPID ;;
esac
"""


class Stage:
    """A folder with the programs. `plan` has a line of commands for each start of the ranks. The file `fails` has the
    beginnings of calls that fail, in order."""

    def __init__(self, folder: Path, plan: str) -> None:
        self.folder = folder
        for name in ("srun", "scontrol", "squeue", "scancel"):
            (folder / name).write_text(SRUN if name == "srun" else OTHERS)
            (folder / name).chmod(0o755)
        (folder / "plan").write_text(plan)

    def start(self, *words: str, job: str = "7") -> subprocess.Popen[str]:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"},
            **{"PATH": f"{self.folder}:{os.environ['PATH']}", "STATE": str(self.folder), "HF_HOME": str(self.folder)},
            **{"RUNS": f"{self.folder}/runs", "LOGS": f"{self.folder}/runs/mine/logs/{job}-0"},
            **{"SLURM_JOB_ID": job, "SLURM_NNODES": "4", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_ON_NODE": "96"},
            **{"SLURM_JOB_NODELIST": "node[0-3]", "SLURM_SUBMIT_DIR": str(ROOT)},
        }
        command = ["bash", "slurm/aspo_32b.sh", "name=mine", f"output_dir={self.folder}/runs", *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *words: str, job: str = "7") -> tuple[int, str]:
        """Exit code and output of a job."""
        process = self.start(*words, job=job)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(("launcher", "cores"), [("srun", 12), ("torchrun", 96)])
def test_the_steps_of_a_job_get_the_nodes_cores_and_a_hash_seed(launcher: str, cores: int, tmp_path: Path) -> None:
    """A node has 96 cores and eight ranks, which torchrun starts within one task."""
    stage = Stage(tmp_path, "true")
    code, said = stage.run(f"LAUNCHER={launcher}")
    assert code == 0, said
    assert "trained to the end" in said
    assert [line.rpartition(" ")[0] for line in stage.lines("steps")] == [f"{cores} 0"]


def test_exit_code_2_after_a_checkpoint_is_a_crash(tmp_path: Path) -> None:
    """A file system that fails for a while must not end a job whose settings have trained."""
    stage = Stage(tmp_path, "save step_000001; exit 1\necho cannot read >$LOGS/node0-rank0.log; exit 2\ntrue")
    code, said = stage.run()
    assert code == 0, said
    assert "exit code 2: crash 2 of at most 3 in a row; restarting from" in said
    assert len(stage.lines("steps")) == 3


def test_exit_code_2_before_ends_the_job(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "echo unknown setting >$LOGS/node0-rank0.log; exit 2")
    code, said = stage.run()
    assert code == 2
    assert said.splitlines()[-1].endswith("unknown setting")


def test_a_job_with_the_same_resume_path_continues_the_run(tmp_path: Path) -> None:
    """The path holds until the run has saved, =never until the job has, and another path begins anew."""
    words = ["checkpoint.resume=runs/a/checkpoints/step_000050", "MAX_CRASHES=0"]
    stage = Stage(tmp_path, "save step_000060; exit 1\nsave step_000070\nexit 1\nsave step_000080; exit 1\nexit 1")
    assert [stage.run(*words, job=job)[0] for job in ("7", "8")] == [1, 0]
    assert stage.run("checkpoint.resume=runs/b/checkpoints/step_000050", "MAX_CRASHES=0", job="9")[0] == 1
    never = ["checkpoint.resume=never", "MAX_CRASHES=0"]
    assert [stage.run(*never, job=job)[0] for job in ("10", "11")] == [1, 1]
    last = [line.rpartition(" ")[2] for line in stage.lines("steps")]
    assert (
        last == [words[0], "checkpoint.resume=auto", "checkpoint.resume=runs/b/checkpoints/step_000050"] + never[:1] * 2
    )


def leave_a_job(folder: Path, state: str, times: int) -> None:
    """Job 6 has used the run's folder, and squeue names it `times` times when asked for jobs in `state`."""
    (folder / "squeue").write_text(
        f'#!/bin/bash\necho "$*" >>$STATE/calls\n'
        f"[[ $* != *{state}* || $(grep -c states $STATE/calls) -gt {times} ]] || echo 6 mine\n"
    )
    (folder / "runs" / "mine" / "logs").mkdir(parents=True)
    (folder / "runs" / "mine" / "logs" / "job").write_text("6\n")


def test_a_job_waits_for_the_nodes_of_the_last_one(tmp_path: Path) -> None:
    """The next job of a chain starts while one node of the last job is still being cleaned."""
    stage = Stage(tmp_path, "true")
    leave_a_job(tmp_path, "CG", times=1)
    code, said = stage.run()
    assert code == 0, said
    assert "waiting at most 10 minutes until the nodes of job 6 are cleaned" in said
    assert [line.split("--states=")[1].split()[0] for line in stage.lines("calls") if "states" in line] == [
        *("CG", "CG", "R,S,CG")
    ]


def test_a_job_does_not_wait_for_ever_for_a_node(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "true")
    leave_a_job(tmp_path, "CG", times=1000)
    process = stage.start()
    assert process.stdout is not None
    assert "nodes of job 6" in process.stdout.readline()
    process.terminate()
    said, _ = process.communicate(timeout=20)
    assert (process.returncode, said.splitlines()[-1].endswith("ended by Slurm")) == (75, True), said
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    (tmp_path / "sleep").chmod(0o755)
    code, said = stage.run()
    assert code == 2
    assert "job 6 writes to" in said
    assert not stage.lines("steps")


@pytest.mark.parametrize("call", ["requeuehold", "release", "--oneliner show job", "--oneliner show node"])
def test_a_busy_controller_does_not_leave_the_job_held(tmp_path: Path, call: str) -> None:
    stage = Stage(tmp_path, "true")
    (tmp_path / "check").write_text("echo node1 no driver >$LOGS/bad-nodes; exit 1")
    (tmp_path / "fails").write_text(f"scontrol {call}")
    code, said = stage.run()
    assert (code, said.splitlines()[-1].endswith("the node check failed; requeued")) == (75, True), said
    changes = [line.split()[1] for line in stage.lines("calls") if line.startswith("scontrol") and "show" not in line]
    order = ["requeuehold", "update", "release"]
    assert changes == sorted([*order, *{call}.intersection(order)], key=order.index)


def send(stage: Stage, number: signal.Signals, *words: str) -> tuple[int, str]:
    """Exit code and output of a job whose script gets a signal once its ranks run."""
    process = stage.start(*words)
    while not stage.lines("steps"):
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def test_a_controller_that_does_not_answer_when_a_job_is_told_to_stop(tmp_path: Path) -> None:
    """The ranks save after all calls have failed."""
    stage = Stage(tmp_path, "while [[ -s $STATE/fails ]]; do sleep 0.2; done; echo 5 >$RUNS/mine/interrupted")
    (tmp_path / "fails").write_text("scontrol --oneliner show job\n" * 3)
    code, said = send(stage, signal.SIGUSR1)
    assert (code, said.splitlines()[-1].endswith("step 5 is saved; requeued")) == (75, True), said


def test_an_evaluation_goes_on_until_the_time_limit(tmp_path: Path) -> None:
    """It has nothing to continue from, and runs once."""
    stage = Stage(tmp_path, "sleep 8")
    code, said = send(stage, signal.SIGUSR1, "COMMAND=eval")
    assert code == 0, said
    assert "eval has nothing to save and goes on" in said
    assert not any(word in line for line in stage.lines("calls") for word in ("show job", "requeue", "scancel"))


def test_a_step_that_outlasts_the_time_limit_is_requeued(tmp_path: Path) -> None:
    """The limit is 34 seconds away when the job is told to stop, and Slurm requeues no job that reaches it. The first
    call of scancel fails."""
    stage = Stage(tmp_path, "exec sleep 61.7")
    (tmp_path / "fails").write_text("scancel --signal=USR1")
    process = stage.start()
    while not stage.lines("steps"):
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    while not any(line.startswith("scontrol requeue 7") for line in stage.lines("calls")):
        time.sleep(0.1)
        assert process.poll() is None
    subprocess.run(["pkill", "--full", "--exact", "sleep 61.7"], check=True)  # as Slurm ends the step
    said, _ = process.communicate(timeout=30)
    assert "the step outlasts the time limit; requeued" in said
    assert process.returncode == 75
    assert sum(line.startswith("scancel --signal=USR1") for line in stage.lines("calls")) >= 2
