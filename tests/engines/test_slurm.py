"""slurm/ on a cluster of four nodes: an interrupted job ends with the metrics of an undisturbed one."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster, Job, missing, wait_until

from megatron_aspo.journal.log import read_metrics

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]

SETTINGS = ["RECIPE=tiny", f"PYTHON={sys.executable}", "SLURM_WAIT=20"]
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0")
STEPS = 12
# None of these settings affects the warm-up, so that the first job computes it for all jobs.
SHORT = [
    f"train.steps={STEPS}",
    "checkpoint.every=6",
    "eval.every=0",
    "rollout.prompts_per_step=8",
    "parallel.tensor=1",
]

Submit = Callable[..., Job]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def submit(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Submit:
    """A function that submits a job; all jobs share the warm-up."""
    root = tmp_path_factory.mktemp("runs")

    def submit(name: str, *words: str, layout: tuple[str, ...] = SMALL, flags: tuple[str, ...] = ()) -> Job:
        settings = [*SETTINGS, f"warmup.cache_dir={root}/cache", *words]
        return Job(cluster, root, name, settings, [*layout, *flags])

    return submit


@pytest.fixture(scope="module")
def trained(submit: Submit) -> Job:
    """The whole recipe over 2 nodes of 2 ranks, tensor-parallel on a node and data-parallel between them."""
    job = submit("trained", layout=("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0"))
    job.finish()
    return job


@pytest.fixture(scope="module")
def undisturbed(submit: Submit, trained: Job) -> list[dict[str, Any]]:
    """Metrics of a short, undisturbed run."""
    job = submit("undisturbed", *SHORT)
    job.finish()
    assert job.exit_code == 0, job.said
    records = without_times(job.run_dir)
    assert [r["step"] for r in records if r["phase"] == "train"] == list(range(1, STEPS + 1))
    assert all(r["optimizer/grad_norm"] > 0.01 for r in records if r["phase"] == "train")
    return records


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    def timed(key: str) -> bool:
        return key == "time" or key.startswith("time/") or key.endswith("tokens_per_second")

    records = (record for record in read_metrics(run_dir) if record["phase"] != "checkpoint")  # time alone, in seconds
    return [{k: v for k, v in record.items() if not timed(k)} for record in records]


def wait_for_step(job: Job, step: int) -> None:
    def there() -> bool:
        log = job.run_dir / "metrics.jsonl"
        return log.exists() and any(r["phase"] == "train" and r["step"] >= step for r in read_metrics(job.run_dir))

    wait_until(there, 300, lambda: f"step {step} of {job.name}\n{job.said}")


def nodes_of_attempts(job: Job) -> list[list[str]]:
    return [hosts.split() for hosts in re.findall("tiny.yaml on (.*);", job.said)]


def check_continues(job: Job, undisturbed: list[dict[str, Any]], restarts: int, saved: int = 0) -> None:
    """The run ends with the metrics of an undisturbed one. `saved`: requeues after a signal."""
    job.finish()
    assert job.exit_code == 0, job.said
    assert int(job.field("Restarts")) == restarts
    assert job.said.count("is saved; requeued") == saved
    assert without_times(job.run_dir) == undisturbed


def test_a_recipe_trains_over_two_nodes(trained: Job) -> None:
    assert trained.exit_code == 0, trained.said
    records = read_metrics(trained.run_dir)
    rewards = [r["reward/mean"] for r in records if r["phase"] == "train"]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.25  # 5 points on average
    assert (trained.run_dir / "report.html").exists()
    logs = trained.run_dir / "logs" / f"{trained.id}-0"
    ranks = {f"node{rank // 2}-rank{rank}.log" for rank in range(4)}
    record = {"config.yaml", "git.txt", "environment.txt", "rank.env", "check-node0.log", "check-node1.log"}
    assert ranks | record <= {path.name for path in logs.iterdir()}
    assert "train 20/20" in (logs / "node0-rank0.log").read_text()
    assert "torch==" in (logs / "environment.txt").read_text()
    assert (logs / "git.txt").read_text().startswith(("commit ", "not a git checkout"))
    assert "2 node(s) are well" in (logs / "check-node0.log").read_text()


def test_a_command_runs_on_the_ranks_of_a_job(submit: Submit, trained: Job, tmp_path: Path) -> None:
    """The evaluation of the last checkpoint over two nodes is the training's own. A command that fails says why."""
    layout = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0")
    *_, last = (record for record in read_metrics(trained.run_dir) if record["phase"] == "eval")
    words = ["COMMAND=eval", "name=trained", "--checkpoint", f"{trained.run_dir}/checkpoints/step_{last['step']:06}"]
    evaluation = submit("evaluation", *words, layout=layout)
    export = submit("export", "COMMAND=export", "name=trained", str(tmp_path / "exported"), layout=layout)
    for job in (evaluation, export):
        job.finish()
    assert evaluation.exit_code == 0, evaluation.said
    printed = json.loads(re.findall(r"^\{.*?^\}", evaluation.said, re.MULTILINE | re.DOTALL)[0])
    assert {name: printed[name] for name in printed if name.startswith("eval/")} == {
        name: value for name, value in last.items() if name.startswith("eval/")
    }
    assert export.exit_code == 2
    assert "model.hf_path is not set; only a model from Hugging Face's format can be exported" in export.said
    assert "crash" not in export.said


@pytest.mark.long
def test_time_limit(submit: Submit, cluster: Cluster, undisturbed: list[dict[str, Any]]) -> None:
    job = submit("time-limit", *SHORT, flags=("--time=60", "--signal=B:USR1@150"))
    wait_for_step(job, 2)
    # Slurm checks limits twice a minute. Until then the ranks are suspended, in place of ranks whose steps take long.
    ranks = job.processes()
    for rank in ranks:
        rank.suspend()
    _, minutes, _ = job.field("RunTime").split(":")
    cluster.call("scontrol", "update", f"JobId={job.id}", f"TimeLimit={int(minutes) + 2}")
    wait_until(lambda: "stop signal received" in job.said, 90, lambda: f"a signal\n{job.said}")
    for rank in ranks:
        rank.resume()
    wait_until(lambda: job.field("Restarts") == "1", 120, lambda: f"a requeue\n{job.said}")
    cluster.call("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    check_continues(job, undisturbed, restarts=1, saved=1)


@pytest.mark.long
def test_requeue(submit: Submit, cluster: Cluster, undisturbed: list[dict[str, Any]]) -> None:
    job = submit("requeue", *SHORT)
    wait_for_step(job, 7)
    cluster.call("scontrol", "requeue", job.id)
    check_continues(job, undisturbed, restarts=1)


@pytest.mark.long
def test_preemption(submit: Submit, cluster: Cluster, undisturbed: list[dict[str, Any]]) -> None:
    job = submit("preempted", *SHORT, flags=("--partition=low",))
    wait_for_step(job, 2)
    urgent = cluster.call("sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    check_continues(job, undisturbed, restarts=1, saved=1)
    assert "JobState=COMPLETED" in cluster.call("scontrol", "show", "job", urgent.strip())


@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=pytest.mark.long)])
def test_signal(submit: Submit, cluster: Cluster, undisturbed: list[dict[str, Any]], launcher: str) -> None:
    job = submit(f"signal-{launcher}", *SHORT, f"LAUNCHER={launcher}")
    wait_for_step(job, 2)
    # The signal skips the batch script, as from a user who wants the nodes back. torchrun's ranks need the script's
    # help.
    flags = ["--batch"] if launcher == "torchrun" else []
    cluster.call("scancel", "--signal=USR1", *flags, job.id)
    check_continues(job, undisturbed, restarts=1, saved=1)


@pytest.mark.long
def test_a_killed_rank(submit: Submit, undisturbed: list[dict[str, Any]]) -> None:
    job = submit("killed", *SHORT)
    wait_for_step(job, 7)
    victim = next(p for p in job.processes() if p.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    check_continues(job, undisturbed, restarts=0)
    assert "crash 1 of at most 3 in a row; restarting from" in job.said
    assert "checkpoints/step_000006" in job.said


@pytest.mark.long
def test_a_node_that_goes_down(submit: Submit, cluster: Cluster, undisturbed: list[dict[str, Any]]) -> None:
    job = submit("node-down", *SHORT)
    wait_for_step(job, 7)
    down = nodes_of_attempts(job)[0][1]
    cluster.call("scontrol", "update", f"NodeName={down}", "State=DOWN", "Reason=test")
    try:
        check_continues(job, undisturbed, restarts=1)
    finally:
        cluster.call("scontrol", "update", f"NodeName={down}", "State=RESUME")
    assert down not in nodes_of_attempts(job)[1]


@pytest.mark.long
def test_a_chain_where_requeueing_is_forbidden(
    submit: Submit, cluster: Cluster, undisturbed: list[dict[str, Any]]
) -> None:
    links = [submit("chain", *SHORT, flags=("--no-requeue", "--dependency=singleton")) for _ in range(2)]
    wait_for_step(links[0], 2)
    cluster.call("scancel", "--signal=USR1", links[0].id)
    check_continues(links[1], undisturbed, restarts=0)
    assert links[0].exit_code == 75
    assert "Slurm cannot requeue the job" in links[1].said  # they share the file


@pytest.mark.long
def test_requeues_are_bounded(submit: Submit, cluster: Cluster) -> None:
    job = submit("restarts", *SHORT, "MAX_RESTARTS=0")
    wait_for_step(job, 1)
    cluster.call("scancel", "--signal=USR1", "--batch", job.id)
    job.finish()
    assert job.exit_code == 75
    assert "is saved; not requeued: MAX_RESTARTS=0" in job.said


@pytest.mark.long
def test_crashes_are_bounded(submit: Submit, trained: Job) -> None:
    run_dir = trained.run_dir.parent / "crashing"
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("a file where a folder must be: nothing can be saved")
    job = submit("crashing", *SHORT, "MAX_CRASHES=1", "checkpoint.every=1")
    job.finish()
    assert job.exit_code == 1
    assert "crash 1 of at most 1 in a row; restarting from the beginning" in job.said
    assert "exit code 1 after MAX_CRASHES=1 crashes in a row" in job.said.splitlines()[-1]
    assert f"{run_dir}/checkpoints" in job.said
    assert "megatron-aspo: rank" in job.said


def test_a_bad_node_is_named_and_left_out(submit: Submit, trained: Job) -> None:
    check = (
        'NODE_CHECK=echo the fan is loose; test "$SLURM_NODEID$SLURM_RESTART_COUNT" != 1'  # node 1 on the first attempt
    )
    job = submit("bad-node", *SHORT, check, "train.steps=1")
    job.finish()
    assert job.exit_code == 0, job.said
    first, second = nodes_of_attempts(job)
    bad = first[1]
    assert f"{bad} NODE_CHECK ended with 1: the fan is loose" in job.said
    assert bad not in second
    assert job.field("ExcNodeList") == bad


def test_the_script_as_it_is_asks_for_gpus(submit: Submit) -> None:
    job = submit("as-it-is", layout=())
    job.finish()
    assert job.exit_code == 1
    for node in range(4):
        assert f"node{node} GPUs: 0 of the 8 GPUs that Slurm granted answer" in job.said
    assert "no node passes the check; " in job.said.splitlines()[-1]


def test_a_mistake_ends_the_job_at_once(submit: Submit) -> None:
    job = submit("mistake", "loss.clip_hgh=0.3")
    job.finish()
    assert job.exit_code == 2
    assert "unknown setting loss.clip_hgh; did you mean loss.clip_high?" in job.said.splitlines()[-1]
    assert "crash" not in job.said
