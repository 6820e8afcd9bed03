"""Programs that try to escape the sandbox, to outlast their limits, or to obtain an unearned reward.

An escape that succeeds prints "escaped", the right answer to its problem. The tests check that those of `ESCAPES`
succeed without a sandbox; those of `GRAVE_ESCAPES` would harm the machine.
"""

import textwrap

_ESCAPE = """\
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
try:
{attack}
    print("escaped")
except BaseException as error:
    print(repr(error))
"""


def escape(attack: str, **values: object) -> str:
    for name, value in values.items():
        attack = attack.replace(f"{{{name}}}", str(value))
    return _ESCAPE.format(attack=textwrap.indent(textwrap.dedent(attack).strip(), "    "))


# Escapes that bubblewrap alone prevents.
NEED_WALLS = {
    *("read a host file", "list the host's folders", "walk /proc", "read a process's command line", "host name"),
    *("installed packages", "this package", "200 threads"),
}

# The test fills in {port} of a server, {pid} of a process, and {folder}, which any user may write to.
ESCAPES = {
    "read a host file": "assert 'root' in open('/etc/passwd').read()",
    "list the host's folders": "assert 'etc' in os.listdir('/')",
    "walk /proc": "assert any(name.isdigit() for name in os.listdir('/proc'))",
    "read a process's command line": "open('/proc/{pid}/cmdline').read()",
    "find a process by signal 0": "os.kill({pid}, 0)",
    "hold a process": "os.pidfd_open({pid})",
    "TCP": "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)",
    "UDP": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "a pair of sockets": "import socket; socket.socketpair()",
    "write a file": "open('{folder}/written', 'w').write('x')",
    "append to a file": "open('{folder}/canary', 'a').write('x')",
    "cut a file": "os.truncate('{folder}/canary', 0)",
    "a symbolic link to the root": "os.symlink('/', '{folder}/link'); assert 'etc' in os.listdir('{folder}/link')",
    "a hard link": "os.link('{folder}/canary', '{folder}/hard')",
    "a folder": "os.mkdir('{folder}/made')",
    "remove a file": "open('{folder}/victim', 'w').close(); os.remove('{folder}/victim')",
    "change permissions": "os.chmod('{folder}/canary', 0o777)",
    "leave the folder": "os.chdir('/etc'); os.stat('passwd')",
    "fork": "os.fork() or os._exit(0)",
    "a zombie": "pid = os.posix_spawn(sys.executable, ['python', '-c', ''], {}); assert pid",
    "a daemon": """
        if os.fork() == 0:
            os.setsid()
            os._exit(0)
        """,
    "a command": "import subprocess; subprocess.run([sys.executable, '-c', ''], check=True)",
    "a worker process": """
        import multiprocessing
        worker = multiprocessing.get_context("fork").Process(target=int)
        worker.start()
        worker.join()
        """,
    "another program": "os.execv(sys.executable, ['python', '-c', 'print(\"escaped\")'])",
    "a file in memory": "os.memfd_create('x')",
    "System V shared memory": "assert libc.shmget(0, 4096, 0o1600) >= 0",
    "POSIX shared memory": """
        from multiprocessing import shared_memory
        block = shared_memory.SharedMemory(create=True, size=16)
        block.unlink()
        """,
    "a user namespace": "assert libc.unshare(0x10000000) == 0",
    "signals to others by fcntl": "import fcntl; fcntl.fcntl(os.pipe()[0], 8, os.getppid())",
    "environment": "assert os.environ['CODE_REWARD_SECRET']",
    "installed packages": "import importlib.util; assert importlib.util.find_spec('numpy')",
    "this package": "import megatron_aspo.rewards.programs.verifier",
    "host name": "assert os.uname().nodename != 'sandbox'",
    "2000 descriptors": "[os.dup(0) for _ in range(2000)]",
    "2 GiB": "bytearray(2 << 30)",
    "2 GiB of mapped files": "import mmap; [mmap.mmap(-1, 1 << 28) for _ in range(8)]",
    "200 threads": """
        import threading
        wait = threading.Event()
        threading.stack_size(1 << 16)
        try:
            for _ in range(200):
                threading.Thread(target=wait.wait).start()
        finally:
            wait.set()
        """,
    "real time": "os.nice(-1)",
}

GRAVE_ESCAPES = {
    "kill everything": "os.kill(-1, 9)",
    "kill the parent": "os.kill(os.getppid(), 9)",
    "trace the parent": "assert libc.ptrace(16, os.getppid(), 0, 0) == 0",
    "read the parent's memory": """
        iov = (ctypes.c_void_p * 2)(id(0), 8)
        assert libc.process_vm_readv(os.getppid(), iov, 1, iov, 1, 0) == 8
        """,
    "limits of the parent": "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, 3))",
    "its own limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); bytearray(2 << 30)",
    "mount": "assert libc.mount(b'none', b'/lib', b'tmpfs', 0, None) == 0",
    "change the root": "os.chroot('/lib')",
    "become root": "os.setuid(0); open('/python/x', 'w')",
    "enter a namespace": "assert libc.setns(0, 0) == 0",
    "type on the terminal": "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
    "io_uring": "assert libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0",
    "bpf, userfaultfd, keyctl, perf": "assert any(libc.syscall(n, 0, 0, 0, 0, 0) >= 0 for n in (321, 323, 250, 298))",
    "the x32 system calls": "assert libc.syscall(0x40000000 + 39) > 0",
    "32-bit system calls": """
        import mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20; int 0x80; ret
        assert ctypes.CFUNCTYPE(int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))() > 0
        """,
    "descriptors of the harness": "assert any(os.path.lexists(f'/dev/fd/{n}') for n in range(4, 99)) or os.fstat(4)",
    "rewrite the standard library": "open(os.__file__, 'r+').write('x')",
    "fill the disk": """
        for path in ("/tmp", "/dev/shm", "/var/tmp", "/run", "/", "/lib", "/python", "/harness"):
            try:
                open(os.path.join(path, "x"), "wb").write(bytes(1 << 20))
                break
            except OSError:
                pass
        else:
            raise OSError("nowhere")
        """,
    "a fork bomb": """
        while True:
            os.fork()
        """,
}

# Each program with a part of the expected reason.
OVERRUNS = {
    "a loop": ("while True: pass", "time limit"),
    "a loop in C": ("sum(range(10**12))", "time limit"),
    "a power": ("print(len(str(9**9**9)))", "time limit"),
    "a regular expression": ("import re; re.match('(a|a)*b', 'a' * 99)", "time limit"),
    "a sleep": ("import time; time.sleep(99)", "time limit"),
    "signals ignored": (
        "import signal\nfor n in set(range(1, 32)) - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "time limit",
    ),
    "a thread that stays": (
        "import threading, time; threading.Thread(target=time.sleep, args=(99,)).start(); print('escaped')",
        "time limit",
    ),
    "a loop at exit": (
        "import atexit\n@atexit.register\ndef f():\n    while True: pass\nprint('escaped')",
        "time limit",
    ),
    "closed descriptors": ("import os\nos.closerange(0, 99)\nwhile True: pass", "time limit"),
    "a flood": ("print('escaped')\nwhile True: print('x' * 9999)", "KiB of output"),
    "a flood of errors": ("import sys\nprint('escaped')\nwhile True: sys.stderr.write('x' * 9999)", "KiB of output"),
    "a flood of reports": ("import os\nwhile True: os.write(3, b'x' * 9999)", "KiB of output"),
    "a report in depth": ("import os; os.write(3, b'{\"reason\": ' + b'[' * 900 + b']' * 900 + b'}')", "wrong answer"),
    "memory": ("x = [0]\nwhile True: x += x", "MemoryError"),
    "a long text": ("'a' * 10**11", "MemoryError"),
    "no stack": ("import ctypes; ctypes.string_at(0)", "signal 11"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "abort": ("import os; os.abort()", "signal"),
    "more input than there is": ("input(); input()", "EOFError"),
    "code that does not compile": ("print('escaped'", "SyntaxError"),
    "parentheses": ("(" * 10**5, "SyntaxError"),
    "a graver exception": ("print('escaped'); raise KeyboardInterrupt", "KeyboardInterrupt"),
}

# The tests of these programs call f for values that no program can guess.
TEST = """
def check(candidate):
    for n in range(40):
        assert candidate(n) == (n * 7919 + 13) % 1009, n
"""
LAZY_TEST = """
def check(candidate):
    for n, found in enumerate(map(candidate, range(40))):
        assert found == (n * 7919 + 13) % 1009, n
"""
EARNED = "def f(n): return (n * 7919 + 13) % 1009"
_SEARCH = """
import gc, sys
def frames():
    frame = sys._getframe()
    while frame := frame.f_back:
        yield frame
def f(n):
    for text in {texts}:
        if "assert " "candidate" in text:
            return eval(text.split("=" "=")[1].split(",")[0])
"""
FORGERIES = {
    "exit on import": "import sys; sys.exit(0)",
    "exit in the call": "def f(n): raise SystemExit(0)",
    "exit past the harness": "import os\ndef f(n): os._exit(0)",
    "KeyboardInterrupt": "def f(n): raise KeyboardInterrupt",
    "equal to everything": "class Any:\n    __eq__ = lambda self, other: True\ndef f(n): return Any()",
    "an int that lies": "class Int(int):\n    __eq__ = lambda self, other: True\ndef f(n): return Int(0)",
    "a str that lies": "class Str(str):\n    __eq__ = lambda self, other: True\ndef f(n): return Str('')",
    "a list that lies": "class List(list):\n    __eq__ = lambda self, other: True\ndef f(n): return List()",
    "no range": "import builtins\nbuiltins.range = lambda *a: []\ndef f(n): return 0",
    "no AssertionError": "import builtins\nbuiltins.AssertionError = StopIteration\ndef f(n): return 0",
    "its own exec": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef f(n): return 0",
    "a report": """
        import os
        def f(n):
            for fd in range(99):
                try:
                    os.write(fd, b'{"passed": 1}\\n')
                except OSError:
                    pass
            os._exit(0)
        """,
    "a result for the judge": """
        import os
        def f(n):
            for fd in range(99):
                try:
                    os.write(fd, b'{"end": "exit", "code": 0, "output": "", "report": "{\\\\"passed\\\\": 1}"}\\n')
                except OSError:
                    pass
            os._exit(0)
        """,
    "a report from a thread": """
        import os, threading
        def write():
            while True:
                os.write(5, b'{"result": true, "passed": 1}\\n')
        threading.Thread(target=write, daemon=True).start()
        def f(n): return 0
        """,
    "a harness of its own": """
        import json, sys
        import megatron_aspo.rewards.programs.inside.jobs as jobs
        jobs.say = lambda *a: None
        json.dumps = lambda *a, **k: '{"passed": 1}'
        sys.modules["__main__"].__dict__.update(fail=print)
        def f(n): return 0
        """,
    "its caller's frames": _SEARCH.replace(
        "{texts}", "(repr(v) for f in frames() for v in {**f.f_globals, **f.f_locals}.values())"
    ),
    "all objects": _SEARCH.replace(
        "{texts}", "(t for o in gc.get_objects() for t in gc.get_referents(o) if type(t) is str)"
    ),
    "the tests' module": "from tests import check\ndef f(n): return (n * 7919 + 13) % 1009",
    "an exception for the judge": 'import os\ndef f(n): os.write(5, b\'{"error": "SystemExit", "message": "0"}\\n\')',
    "an exception that is none": 'import os\ndef f(n): os.write(5, b\'{"error": "exec", "message": "1"}\\n\')',
    "a reply in depth": "import os\ndef f(n): os.write(5, b'{\"result\": ' + b'[' * 60000 + b'\\n')",
    "a reply of a strange type": 'import os\ndef f(n): os.write(5, b\'{"result": {"object": 1}}\\n\')',
    "a reply that does not end": "import os\ndef f(n):\n    while True: os.write(5, b'1' * 9999)",
    "no reply": "import time\ndef f(n): time.sleep(99)",
    "a closed line": "import os, time\ndef f(n): os.close(5); time.sleep(99)",
    "an iterator without end": "import itertools\ndef f(n): return itertools.count()",
    "AssertionError": "def f(n): raise AssertionError",
    "StopIteration": "def f(n): raise StopIteration",
    "nothing": "",
    "not a function": "f = 7",
}
