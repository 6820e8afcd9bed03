"""The system calls that a program under test may make, as a seccomp filter; all others fail with EPERM.

A program can compute, read files that are open to it, and start threads. It cannot start, signal or trace another
process, open a socket, or make, change or remove a file.
"""

from __future__ import annotations

import errno
import platform
import re
import struct

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Name, number on x86_64, number on aarch64 (asm/unistd_64.h, asm-generic/unistd.h); - is none.
_TABLE = """
memory: brk 12 214, mmap 9 222, mprotect 10 226, mremap 25 216, munmap 11 215, madvise 28 233
descriptors: read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, lseek 8 62, close 3 57, dup 32 23,
    dup2 33 -, dup3 292 24, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72
reading files: stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, access 21 -, faccessat 269 48, faccessat2 439 439,
    readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17
time: time 201 -, times 100 153, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114, nanosleep 35 101,
    clock_nanosleep 230 115, alarm 37 -, getitimer 36 102, setitimer 38 103, pause 34 -
its own threads and signals: futex 202 98, set_robust_list 273 99, rseq 334 293, sched_yield 24 124,
    sched_getaffinity 204 123, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
    sigaltstack 131 132, restart_syscall 219 128, exit 60 93, exit_group 231 94
itself: getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176,
    getegid 108 177, getrlimit 97 163, getrusage 98 165, getrandom 318 278, uname 63 160, sysinfo 99 179
"""
_ALLOWED: list[tuple[str, str]] = re.findall(r"[a-z]\w* (\d+) (\d+|-)", _TABLE)
_OPENAT, _CLONE, _PRLIMIT, _FCNTL, _IOCTL = (257, 56), (56, 220), (302, 261), (72, 25), (16, 29)
_CLONE3 = 435  # on both

# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC; O_TMPFILE holds O_RDWR or O_WRONLY. The same on both machines.
_OPEN_TO_WRITE = 0o1103
_CLONE_THREAD, _CLONE_NEW_NAMESPACE = 0x10000, 0x7E020080
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: not F_SETOWN, which has signals sent to others.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
# TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX.
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)

# struct seccomp_data: number, architecture, instruction pointer, six arguments of 64 bits, little-endian.
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_REFUSE, _MISSING = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS


def seccomp_filter() -> bytes:
    """An array of struct sock_filter for this machine. Raises OSError if its architecture has no list here."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(f"this machine is {machine}, and there is no list of its system calls")
    column = list(_ARCHITECTURES).index(machine)
    code = [
        _op(_LOAD, _ARCHITECTURE_AT),
        _op(_JUMP_EQUAL, _ARCHITECTURES[machine], 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER_AT),
    ]
    # x86_64 has a second set of numbers, from 2**30. The list has none of them, and they are refused too.
    for numbers in _ALLOWED:
        if numbers[column] != "-":
            code += [_op(_JUMP_EQUAL, int(numbers[column]), 0, 1), _op(_RETURN, _ALLOW)]
    code += _when(_OPENAT[column], argument=2, tests=[_op(_JUMP_ANY_BIT, _OPEN_TO_WRITE, 1, 0), _op(_RETURN, _ALLOW)])
    # A filter cannot read the arguments of clone3. Where it is missing the C library takes clone.
    code += [_op(_JUMP_EQUAL, _CLONE3, 0, 1), _op(_RETURN, _MISSING)]
    thread = [_op(_JUMP_ANY_BIT, _CLONE_THREAD, 0, 2), _op(_JUMP_ANY_BIT, _CLONE_NEW_NAMESPACE, 1, 0)]
    code += _when(_CLONE[column], argument=0, tests=[*thread, _op(_RETURN, _ALLOW)])
    for numbers, argument, values in (
        (_PRLIMIT, 0, (0,)),  # of the caller
        (_FCNTL, 1, _FCNTL_COMMANDS),
        (_IOCTL, 1, _IOCTL_COMMANDS),
    ):
        tests = [op for value in values for op in (_op(_JUMP_EQUAL, value, 0, 1), _op(_RETURN, _ALLOW))]
        code += _when(numbers[column], argument, tests)
    code.append(_op(_RETURN, _REFUSE))
    return b"".join(code)


def _when(number: int, argument: int, tests: list[bytes]) -> list[bytes]:
    """Run `tests` on the low half of an argument of this system call, and refuse the call if no test returns. The
    kernel ignores the high half of these arguments."""
    body = [_op(_LOAD, 16 + 8 * argument), *tests, _op(_RETURN, _REFUSE)]
    return [_op(_JUMP_EQUAL, number, 0, len(body)), *body]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
