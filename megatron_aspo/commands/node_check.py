"""Check of a job's nodes before its ranks start: one task per node. `python -m megatron_aspo.commands.node_check`

Each node checks itself; then all check that they share the folder for logs, and reduce a tensor over the network.
Exit code 0: all nodes are sound; 1: some are not (`bad-nodes` in the folder for logs has a line for each of them, its
name and the reason); 2: a setting is wrong.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from megatron_aspo.commands.arguments import Parser, add_rank_arguments, exit_code, parse, parse_run_config
from megatron_aspo.config.checks import check_world_size
from megatron_aspo.config.training import OptimizerConfig
from megatron_aspo.journal.log import save_provenance
from megatron_aspo.ranks.launch import compute_capability, rank_environment
from megatron_aspo.tools.doctor import doctor

PATIENCE = timedelta(minutes=3)
"""Time that nodes wait for each other: imports from a busy shared file system are slow."""

NODE_CHECK_LIMIT = timedelta(minutes=10)
"""Time that the site's NODE_CHECK may take."""

SILENCE = "does not answer"
ELEMENTS = 16 << 20
"""Size of the reduced float32 tensor."""


def own_problems() -> list[str]:
    """Return the problems that `megatron-aspo doctor` and the site's NODE_CHECK find on this node, a line each."""
    problems = doctor.problems()
    command = ["bash", "-c", os.environ.get("NODE_CHECK", "")]
    limit = NODE_CHECK_LIMIT.total_seconds()
    try:
        done = subprocess.run(command, capture_output=True, errors="replace", timeout=limit)
    except subprocess.TimeoutExpired:
        return [*problems, f"NODE_CHECK did not end in {limit:.0f} s"]
    if done.returncode:
        words = (done.stdout + done.stderr).split()
        problems.append(f"NODE_CHECK ended with {done.returncode}: {' '.join(words)[-200:]}")
    return problems


class Meeting:
    """Exchange of findings among nodes, through a store on the first node."""

    def __init__(self, rank: int, nodes: int, patience: timedelta) -> None:
        self.rank, self.nodes, self.patience = rank, nodes, patience
        self.store = self._store(rank == 0)

    def gather(self, topic: str, problems: list[str], longer: timedelta = timedelta(0)) -> list[list[str]]:
        """Return the problems of every node, [SILENCE] for a node that does not answer in `patience` plus `longer`
        after the first one. Collective."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(problems))
        if self.rank == 0:
            deadline = time.monotonic() + (self.patience + longer).total_seconds()
            reports = [self._receive(f"{topic}/{node}", deadline) for node in range(self.nodes)]
            self.store.set(topic, json.dumps(reports))
        self.store.wait([topic], 2 * (self.patience + longer))  # the first node waits for the slowest one first
        return json.loads(self.store.get(topic))

    def leave(self, present: list[int]) -> None:
        """End the meeting; the first node, which has the store, waits for the others in `present`."""
        self.store.set(f"leave/{self.rank}", "")
        if self.rank == 0:
            self.store.wait([f"leave/{node}" for node in present])

    def rejoin(self) -> None:
        """Connect anew, in a fork of this node's process."""
        self.store = self._store(False)

    def _store(self, is_master: bool) -> dist.TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, self.nodes, is_master, self.patience, wait_for_workers=False)

    def _receive(self, key: str, deadline: float) -> list[str]:
        try:
            self.store.wait([key], timedelta(seconds=max(1.0, deadline - time.monotonic())))
        except dist.DistStoreError:
            return [SILENCE]
        return json.loads(self.store.get(key))


def write_canary(meeting: Meeting, folder: Path) -> None:
    """Write a file on the first node that all others must see. It comes before the node's own checks: if these are
    slow, the others do not wait for the file."""
    if meeting.rank == 0:
        token = secrets.token_hex(8)
        (folder / "canary").write_text(token)
        meeting.store.set("canary", token)


def folder_problems(meeting: Meeting, folder: Path) -> list[str]:
    """Return a problem if this node cannot read what the first one has written to `folder`."""
    canary = folder / "canary"
    token = meeting.store.get("canary").decode()
    # A network file system may show a new file late.
    deadline = time.monotonic() + meeting.patience.total_seconds() / 2
    while (seen := canary.read_text() if canary.is_file() else "nothing") != token:
        if time.monotonic() > deadline:
            return [f"{folder} is not shared: {canary.name} has {seen}, the first node wrote {token}"]
        time.sleep(0.2)
    return []


def reduce_problems(meeting: Meeting, members: list[int], topic: str) -> list[str]:
    """Return problems of an all-reduce over the nodes `members`, once per GPU. Collective over these nodes.

    A fork reduces: a collective that hangs on a GPU may end its process or never return.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_reduce, args=(meeting, members, topic, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(1.5 * meeting.patience.total_seconds()):
            return receiver.recv()
        return [f"{topic}: no result"]
    except EOFError:
        process.join()
        return [f"{topic}: its process ended with code {process.exitcode}"]
    finally:
        process.kill()


def _reduce(meeting: Meeting, members: list[int], topic: str, sender: Connection) -> None:
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # else torch's watchdog aborts the process before it can report
    meeting.rejoin()
    sender.send(_reduced(meeting, members, topic))
    sys.stdout.flush()
    os._exit(0)  # leaving a process group waits for kernels that may hang


def _reduced(meeting: Meeting, members: list[int], topic: str) -> list[str]:
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
            group = dist.new_group()  # NCCL ties a communicator to a GPU
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
    except RuntimeError as error:  # a broken or silent peer
        return [f"{topic}: {str(error).splitlines()[0]}"]
    return []


def host_threads(config: OptimizerConfig, ranks: int) -> int:
    """Return the threads of each of a node's `ranks` in torch's operations on the host: its share of the cores if Adam
    runs there, else 1."""
    return max(1, min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // ranks)) if config.cpu_offload else 1


def reasons(names: list[str], reports: list[list[str]]) -> dict[str, str]:
    """Return the problems of each node that has any."""
    return {name: "; ".join(report) for name, report in zip(names, reports, strict=True) if report}


def blame(names: list[str], reports: list[list[str]]) -> dict[str, str]:
    """Return the nodes to exclude after a reduction, and the reasons. Silent nodes explain the others' problems."""
    return reasons(names, [report if report == [SILENCE] else [] for report in reports]) or reasons(names, reports)


def find_bad_nodes(meeting: Meeting, names: list[str], folder: Path) -> dict[str, str]:
    """Return the names of bad nodes, with reasons. Collective."""
    write_canary(meeting, folder)
    longer = NODE_CHECK_LIMIT if os.environ.get("NODE_CHECK") else timedelta(0)
    bad = reasons(names, meeting.gather("own", own_problems() + folder_problems(meeting, folder), longer))
    if bad or meeting.nodes == 1:
        return bad
    nodes = list(range(meeting.nodes))
    reports = meeting.gather("all-reduce", reduce_problems(meeting, nodes, "all-reduce"))
    if not any(reports) or [SILENCE] in reports:
        return blame(names, reports)
    # One bad node breaks the reduction for all. In pairs with its two neighbours it fails twice, sound nodes once at
    # most.
    complaints: list[list[str]] = [[] for _ in names]
    for first in (0, 1):
        number = (meeting.rank - first) % meeting.nodes // 2
        pair = [node for node in nodes if (node - first) % meeting.nodes // 2 == number]
        topic = f"pair-{first}"
        problems = reduce_problems(meeting, pair, f"{topic}-{number}") if len(pair) == 2 else []
        for complaint, report in zip(complaints, meeting.gather(topic, problems), strict=True):
            complaint.extend(report)
    worst = max(len(complaint) for complaint in complaints)
    return blame(names, [complaint if len(complaint) == worst else [] for complaint in complaints])


def main(argv: Sequence[str] | None = None) -> int:
    """One task of the check."""

    def run() -> int:
        parser = Parser(prog="megatron_aspo.commands.node_check")
        add_rank_arguments(parser, "train")
        parser.add_argument("--ranks", type=int, required=True, help="ranks that the job will start")
        parser.add_argument("--log-dir", type=Path, required=True, help="folder of this attempt's logs, on all nodes")
        arguments = parse(parser, argv)
        config = parse_run_config(arguments)
        check_world_size(config.parallel, config.rollout, arguments.ranks)
        names = os.environ["NODE_NAMES"].split()
        meeting = Meeting(int(os.environ["RANK"]), len(names), PATIENCE)
        if meeting.rank == 0:
            resolved = OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
            save_provenance(arguments.log_dir, resolved, sys.argv if argv is None else argv)
            variables = rank_environment(config.parallel, compute_capability())
            variables["OMP_NUM_THREADS"] = str(host_threads(config.optimizer, arguments.ranks // len(names)))
            lines = [f"{name}={value}\n" for name, value in variables.items()]
            (arguments.log_dir / "rank.env").write_text("".join(lines))
        bad = find_bad_nodes(meeting, names, arguments.log_dir)
        if meeting.rank == 0:
            lines = "".join(f"{name} {reason}\n" for name, reason in bad.items())
            (arguments.log_dir / "bad-nodes").write_text(lines)
            print(lines or f"{len(names)} node(s) are well\n", end="")
        meeting.leave([node for node, name in enumerate(names) if bad.get(name) != SILENCE])
        return 1 if bad else 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
