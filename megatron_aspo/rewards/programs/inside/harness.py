"""The process inside a sandbox: starts a process for each job, gives it the program, and reports how it ended.

A sandbox holds only this folder of the package, and no answer. Outputs are compared outside, results by tests in
another sandbox, whose calls reach the program as JSON. A program that takes over this process gains nothing.

Descriptor 0 brings jobs as lines of JSON. Each is answered on descriptor 1 by {"code": ..., "output": ...,
"report": ...}, where a negative code is the signal that ended the job's process.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import resource
import select
import signal
import sys

from megatron_aspo.rewards.programs.inside.jobs import JOBS, REPORT, explain, say

TYPE_CHECKING = False  # importing typing takes as long as starting Python
if TYPE_CHECKING:
    from typing import Any, NoReturn, TextIO

_NOBODY = 65534
_STACK = 64 << 20
_CLONE_NEWUSER, _CAPABILITY_VERSION_3 = 0x10000000, 0x20080522
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _SECCOMP_FILTER, _PR_SET_NO_NEW_PRIVS = 1, 22, 2, 38


def main(drop_root: bool) -> None:
    if drop_root:  # root's processes are not counted, and their number has no limit
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        # In a user namespace of its own this sandbox's processes are counted apart.
        if _libc().unshare(_CLONE_NEWUSER):
            raise OSError(ctypes.get_errno(), "cannot make a user namespace")
    with open(0, "rb", closefd=False) as jobs:
        for line in jobs:
            say(1, run(json.loads(line)))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a process of its own. The kernel ends it at the limits of CPU time and output."""
    given, output, _, report = files = [os.memfd_create("") for _ in range(4)]
    os.write(given, job.get("input", "").encode("utf-8", "surrogatepass"))
    os.lseek(given, 0, os.SEEK_SET)
    pid = os.fork()
    if pid == 0:
        become(job, [*files, *job["channel"]])  # does not return
    for end in job["channel"]:
        os.close(end)
    ended = os.pidfd_open(pid)
    select.select([ended, 0], [], [], job["wall_seconds"])  # descriptor 0 ends with the trainer
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    text = {file: os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace") for file in (output, report)}
    for end in (*files, ended):
        os.close(end)
    return {"code": os.waitstatus_to_exitcode(status), "output": text[output], "report": text[report]}


def become(job: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Turn this fork into a job's process, with `descriptors` as 0, 1, 2, ..."""
    above = max(*descriptors, len(descriptors)) + 1  # in two steps, so that none overwrites another
    for target, end in enumerate(descriptors):
        os.dup2(end, above + target)
    for target in range(len(descriptors)):
        os.dup2(above + target, target)
    os.closerange(len(descriptors), 1 << 16)
    confine(job["limits"], bytes.fromhex(job["filter"]))
    code = 0
    try:
        JOBS[job["kind"]](job)
    except SystemExit as error:
        code = int(error.code is not None and error.code != 0)
    except BaseException as error:
        say(REPORT, {"reason": explain(error)})
        try:
            flush(sys.__stdout__)
        finally:
            os._exit(1)
    finish(code)


def finish(code: int) -> NoReturn:
    """End as Python does: wait for threads, call exit functions, flush streams. The interpreter is not finalised, which
    would take longer than starting this process."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    flush(sys.stdout)
    sys.modules["__main__"].__dict__.clear()  # closes the program's own streams
    flush(sys.__stdout__)
    os._exit(code)


def flush(stream: TextIO | None) -> None:
    if stream is not None and not stream.closed:
        stream.flush()


def confine(limits: dict[str, int], code: bytes) -> None:
    """Limit this process's resources and system calls."""
    for kind, limit in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_CPU, limits["seconds"]),
        (resource.RLIMIT_NOFILE, limits["descriptors"]),
        (resource.RLIMIT_FSIZE, limits["output"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, limits["tasks"]),
    ):
        if limit is not None:
            resource.setrlimit(kind, (limit, limit))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK if hard < 0 else min(_STACK, hard), hard))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # too much output ends the process; Python ignores the signal
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    program = Program(len(code) // 8, ctypes.addressof(buffer))
    libc = _libc()
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    version, no_capabilities = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3), (ctypes.c_uint32 * 6)()
    if libc.capset(version, no_capabilities):  # root could raise its limits again
        raise OSError(ctypes.get_errno(), "cannot drop capabilities")
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "cannot set a seccomp filter")


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
