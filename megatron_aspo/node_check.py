"""What a job looks at before it starts its ranks: one task on every node. `python -m megatron_aspo.node_check`

Each node looks at itself; then all see whether they share the folder for logs, and reduce a tensor over the network.
Exit code 0: all is well; 1: something is not (`bad-nodes` in the folder for logs has a line for every node that is to
blame: its name and why); 2: the settings are wrong, on any machine.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from megatron_aspo import cli, doctor
from megatron_aspo.config import RunConfig, to_dict
from megatron_aspo.config_checks import check_world_size
from megatron_aspo.run_log import save_provenance

SILENCE = "does not answer"
ELEMENTS = 16 << 20
"""Of the tensor that is reduced, float32."""


def rank_environment(config: RunConfig, compute_capability: tuple[int, int] | None) -> dict[str, str]:
    """Variables that ranks need and that depend on the layout and the GPU (None: there is none)."""
    parallel = config.parallel
    if compute_capability is None or (parallel.tensor == 1 and parallel.context == 1):
        return {}
    # Communication that overlaps with the layers' compute: norms leave it some multiprocessors.
    environment = {"NVTE_FWD_LAYERNORM_SM_MARGIN": "16", "NVTE_BWD_LAYERNORM_SM_MARGIN": "16"}
    if compute_capability[0] < 10:  # up to Hopper kernels start in the order of their launch only so
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return environment


def own_problems() -> list[str]:
    """What `megatron-aspo doctor` and the site's own command find wrong with this node, a line each."""
    problems = doctor.problems()
    command = os.environ.get("NODE_CHECK")
    if command:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            words = (done.stdout + done.stderr).split()
            problems.append(f"NODE_CHECK ended with {done.returncode}: {' '.join(words)[-200:]}")
    return problems


class Meeting:
    """What the nodes tell each other, through a store on the first one.

    Args:
        rank, nodes: which one this is, of how many.
        patience: how long they wait for each other.
    """

    def __init__(self, rank: int, nodes: int, patience: timedelta) -> None:
        self.rank, self.nodes, self.patience = rank, nodes, patience
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(address, port, nodes, rank == 0, patience, wait_for_workers=False)

    def gather(self, topic: str, word: list[str]) -> list[list[str]]:
        """What every node has to say, on every node: complaints, or nothing. Silence is a complaint. Collective."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(word))
        if self.rank == 0:
            deadline = time.monotonic() + self.patience.total_seconds()
            self.store.set(topic, json.dumps([self._heard(f"{topic}/{node}", deadline) for node in range(self.nodes)]))
        self.store.wait([topic], 2 * self.patience)  # the first node waits for the slowest before it answers
        return json.loads(self.store.get(topic))

    def leave(self, present: list[int]) -> None:
        """The store lives on the first node, which therefore goes last of those `present`."""
        self.store.set(f"leave/{self.rank}", "")
        if self.rank == 0:
            self.store.wait([f"leave/{node}" for node in present])

    def _heard(self, key: str, deadline: float) -> list[str]:
        try:
            self.store.wait([key], timedelta(seconds=max(1.0, deadline - time.monotonic())))
        except dist.DistStoreError:
            return [SILENCE]
        return json.loads(self.store.get(key))


def folder_problems(meeting: Meeting, folder: Path) -> list[str]:
    """Whether this node reads what the first one has just written to `folder`. Collective."""
    canary = folder / "canary"
    if meeting.rank == 0:
        token = secrets.token_hex(8)
        canary.write_text(token)
        meeting.store.set("canary", token)
    token = meeting.store.get("canary").decode()
    # A network file system may show a new file late.
    deadline = time.monotonic() + meeting.patience.total_seconds() / 2
    while (seen := canary.read_text() if canary.is_file() else "nothing") != token:
        if time.monotonic() > deadline:
            return [f"{folder} is not shared: in {canary.name} is {seen}, the first node wrote {token}"]
        time.sleep(0.2)
    return []


def reduce_problems(meeting: Meeting, members: list[int], topic: str) -> list[str]:
    """What goes wrong in a sum over the nodes `members`, once for every GPU of a node (its network card, its cables).

    To be called on these nodes."""
    gpus = torch.cuda.device_count()
    nodes = len(members)
    try:
        dist.init_process_group(
            "nccl" if gpus else "gloo",
            store=dist.PrefixStore(topic, meeting.store),
            rank=members.index(meeting.rank),
            world_size=nodes,
            timeout=meeting.patience,
        )
        for index in range(max(1, gpus)):
            if gpus:
                torch.cuda.set_device(index)
            group = dist.new_group()  # a communicator of its own: NCCL ties one to a GPU
            tensor = torch.empty(ELEMENTS, device="cuda" if gpus else "cpu")
            seconds = math.inf
            for _ in range(2):  # the first one connects
                tensor.fill_(meeting.rank + 1)
                start = time.perf_counter()
                dist.all_reduce(tensor, group=group)
                low, high = (bound.item() for bound in tensor.aminmax())
                seconds = time.perf_counter() - start
            expected = sum(members) + nodes
            if (low, high) != (expected, expected):
                return [f"{topic} {index}: {low} to {high} instead of {expected}"]
            print(f"{topic} {index} over {nodes} nodes: {tensor.nbytes / seconds / 1e9:.2f} GB/s")
    except RuntimeError as error:  # what a broken or silent peer ends in
        return [f"{topic}: {str(error).splitlines()[0]}"]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return []


def blame(names: list[str], reports: list[list[str]]) -> dict[str, str]:
    """The nodes to leave out, and why. Those that fell silent explain the others' complaints."""
    silent = {name: SILENCE for name, report in zip(names, reports, strict=True) if report == [SILENCE]}
    return silent or {name: "; ".join(report) for name, report in zip(names, reports, strict=True) if report}


def find_bad_nodes(meeting: Meeting, names: list[str], folder: Path) -> dict[str, str]:
    """Names of bad nodes, and why each is bad. Collective."""
    bad = blame(names, meeting.gather("own", own_problems() + folder_problems(meeting, folder)))
    if bad or meeting.nodes == 1:
        return bad
    everyone = list(range(meeting.nodes))
    reports = meeting.gather("all-reduce", reduce_problems(meeting, everyone, "all-reduce"))
    if not any(reports) or [SILENCE] in reports:
        return blame(names, reports)
    # A sum fails for all. In pairs with its two neighbours, the bad node fails twice and the good ones at most once.
    complaints: list[list[str]] = [[] for _ in names]
    for first in (0, 1):
        mine = (meeting.rank - first) % meeting.nodes // 2
        pair = [node for node in everyone if (node - first) % meeting.nodes // 2 == mine]
        topic = f"pair-{first}"
        problems = reduce_problems(meeting, pair, f"{topic}-{mine}") if len(pair) == 2 else []
        for complaint, report in zip(complaints, meeting.gather(topic, problems), strict=True):
            complaint.extend(report)
    worst = max(len(complaint) for complaint in complaints)
    return blame(names, [complaint if len(complaint) == worst else [] for complaint in complaints])


def main(argv: list[str] | None = None) -> int:
    """One task of the check."""

    def run() -> int:
        parser = cli.Parser(prog="megatron_aspo.node_check")
        cli.add_run_arguments(parser)
        parser.add_argument("--ranks", type=int, required=True, help="ranks that the job will start")
        parser.add_argument("--log-dir", type=Path, required=True, help="the attempt's folder, seen by all nodes")
        parser.add_argument(
            "--patience",
            type=lambda seconds: timedelta(seconds=float(seconds)),
            default=timedelta(minutes=3),  # importing from a busy shared file system takes its time
            help="seconds that nodes wait for each other",
        )
        arguments = cli.parse(parser, argv)
        config = cli.parse_run_config(arguments)
        check_world_size(config, arguments.ranks)
        names = os.environ["NODE_NAMES"].split()
        meeting = Meeting(int(os.environ["RANK"]), len(names), arguments.patience)
        if meeting.rank == 0:
            resolved = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
            save_provenance(arguments.log_dir, resolved, sys.argv if argv is None else argv)
            capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
            variables = [f"{name}={value}\n" for name, value in rank_environment(config, capability).items()]
            (arguments.log_dir / "rank.env").write_text("".join(variables))
        bad = find_bad_nodes(meeting, names, arguments.log_dir)
        if meeting.rank == 0:
            lines = "".join(f"{name} {reason}\n" for name, reason in bad.items())
            (arguments.log_dir / "bad-nodes").write_text(lines)
            print(lines or f"{len(names)} node(s) are well\n", end="")
        meeting.leave([node for node, name in enumerate(names) if bad.get(name) != SILENCE])
        return 1 if bad else 0

    return cli.exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
