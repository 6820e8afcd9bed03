"""A process that imports Transformer Engine and Megatron-Core once, and forks the ranks of tests.

Each request on its standard input (pickled) is a world: every rank runs `function(*args)`, as `ranks.run` does. The
answer is a line with the ranks' exit codes.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

from te_reference.install import install

install()


from megatron_aspo.policy.cpu import cuda  # noqa: E402

cuda.import_megatron()

import ranks  # noqa: E402

from te_reference.install import pretend_gpu  # noqa: E402
from te_reference.registry import set_capability  # noqa: E402


def prepare() -> None:
    """Import what every rank needs."""
    import torch._dynamo  # with the first optimizer

    import megatron_aspo.train  # noqa: F401

    cuda.enable()
    torch.set_num_threads(1)


def run_rank(rank: int, request: dict[str, Any], folder: Path) -> None:
    """The life of a forked rank, from the arguments to the file with its result."""
    set_capability(request["capability"])
    if request["gpu"]:
        pretend_gpu()
    # Unpickled here: the test's module is imported by the ranks alone.
    function, args = pickle.loads(request["call"])
    ranks._rank(rank, request["world_size"], request["port"], folder, function, args)


def fork(rank: int, request: dict[str, Any], folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        errors = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(errors, 2)
        run_rank(rank, request, folder)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_world(request: dict[str, Any]) -> list[int | None]:
    """Exit codes of the ranks; None for those that were ended because another failed or time was up."""
    folder, deadline = Path(request["folder"]), time.monotonic() + request["timeout"]
    pids = [fork(rank, request, folder) for rank in range(request["world_size"])]
    codes: dict[int, int] = {}
    while len(codes) < len(pids) and not any(codes.values()) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.01)
    for pid in pids:
        if pid not in codes:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    return [codes.get(pid) for pid in pids]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints does not mix with the answers
    prepare()
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        print(json.dumps(run_world(request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
