"""Programming problems in the formats of public data sets, and comparison of answers."""

import base64
import json
import os
import pickle
import struct
import time
import zlib
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from megatron_aspo.rewards.programs.inside.nodes import (
    is_one_of,
    is_same_list,
    is_same_tree,
    list_node,
    list_values,
    tree_node,
    tree_values,
)
from megatron_aspo.rewards.programs.inside.wire import decode, encode
from megatron_aspo.rewards.programs.problems import CodeProblem, common_imports
from megatron_aspo.rewards.programs.syscalls import seccomp_filter
from megatron_aspo.rewards.programs.verifier import extract_program, same_output

STDIN = CodeProblem("script", (("1\n", "2\n"), ("3\n", "4\n")))
CALLS = [([[1, 2], "a"], 3), ([[], "b"], None)]


def packed(value: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def lcb(kind: str, *tests: tuple[str, str]) -> list[dict[str, str]]:
    return [{"input": given, "output": expected, "testtype": kind} for given, expected in tests]


LISTS = {"inputs": ["1\n", "3\n"], "outputs": ["2\n", "4\n"]}
CASES = [{"type": "stdin_stdout", "input": "1\n", "output": "2\n", "fn_name": None},
         {"type": "stdin_stdout", "input": "3\n", "output": "4\n"}]  # fmt: skip
LCB = {
    "public_test_cases": json.dumps(lcb("stdin", ("1\n", "2\n"))),
    "private_test_cases": packed(json.dumps(lcb("stdin", ("3\n", "4\n")))),
    "metadata": "{}",
}
LCB_CALLS = {
    "public_test_cases": json.dumps(lcb("functional", ('[1, 2]\n"a"', "3"))),
    "private_test_cases": json.dumps(lcb("functional", ('[]\n"b"', "null"))),
    "metadata": '{"func_name": "f"}',
}
CHECK = "def check(c): pass\n"
CHECKED = CodeProblem("tests", (f"{CHECK}\ncheck(f)\n",))
ASSERTIONS = ["assert set(f(1)) == g({2})", "assert sqrt(f(4)) == h()"]
SETUP = "from math import sqrt\ndef h(): return 2"
ARCHER = "def check(candidate):\n    assert candidate(xs=[1, 2], k=inf) == max(3, 2)\n\n\ncheck(Solution().least)"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (LISTS, STDIN),
        (LISTS | {"fn_name": None}, STDIN),
        (LISTS | {"inputs": [["1", ""], ["3", ""]]}, STDIN),
        ({"ground_truth": json.dumps(LISTS)}, STDIN),
        ({"ground_truth": [json.dumps(LISTS)]}, STDIN),
        ({"reward_model": {"ground_truth": LISTS}}, STDIN),
        ({"input_output": json.dumps(LISTS)}, STDIN),
        ({"ground_truth": json.dumps(CASES)}, STDIN),
        (LCB, STDIN),
        ({"prompt": 'def f(n):\n    """Half of n."""\n', "test": CHECK, "entry_point": "f"}, CHECKED),
        (
            {"prompt": "import math\ndef g(n): return n\ndef f(n):\n", "test": CHECK, "entry_point": "f"},
            replace(CHECKED, prelude="import math\ndef g(n):\n    return n"),
        ),
        ({"prompt": "Write a function", "test": CHECK, "entry_point": "f"}, CHECKED),
        (
            {
                "test_list": ASSERTIONS,
                "test_imports": ["from math import sqrt"],
                "test_setup_code": "def h(): return 2",
            },
            CodeProblem("tests", tuple(f"{SETUP}\n{assertion}" for assertion in ASSERTIONS)),
        ),
        ({"ground_truth": '["assert f(1) == 2"]'}, CodeProblem("tests", ("assert f(1) == 2",))),
        (
            {"ground_truth": json.dumps({"functional": ARCHER})},
            CodeProblem("tests", (f"from math import inf\n{ARCHER}",)),
        ),
    ],
)
def test_formats(row: dict[str, Any], problem: CodeProblem) -> None:
    assert CodeProblem.from_row(row) == problem


@pytest.mark.parametrize(
    ("row", "calls"),
    [
        (LCB_CALLS, CALLS),
        ({"fn_name": "f", "inputs": ['[1, 2]\n"a"', '[]\n"b"'], "outputs": ["3", "null"]}, CALLS),
        ({"fn_name": "f", "inputs": [[[1, 2], "a"], [[], "b"]], "outputs": [3, None]}, CALLS),
        # In APPS the result is optionally wrapped in a list.
        ({"fn_name": "f", "inputs": [[1]], "outputs": [[2]]}, [([1], 2)]),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [[2]]}, [([1], [2])]),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [[[2, 3]]]}, [([1], (2, 3))]),
    ],
)
def test_calls(row: dict[str, Any], calls: list[tuple[list[Any], Any]]) -> None:
    tests = CodeProblem.from_row(row).tests
    assert len(tests) == len(calls)
    for test, (arguments, right) in zip(tests, calls, strict=True):
        for result in (right, "wrong"):
            solution = Mock()
            solution.f.return_value = result
            with nullcontext() if result == right else pytest.raises(AssertionError, match="wrong answer"):
                exec(test, {"Solution": lambda solution=solution: solution})
            solution.f.assert_called_once_with(*arguments)


def test_common_names_are_imported() -> None:
    code = "def f(xs: List[int]): return gcd(math.inf, *xs), bisect(xs, 1)"
    assert common_imports(code).splitlines() == [
        *("import bisect", "import math", "from typing import List", "from bisect import bisect"),
        "from math import gcd, inf",
    ]


class Command:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"answer": 4}, "needs entry_point and test"),
        ({"reward_model": {"style": "rule"}}, r"reward_model\.ground_truth "),
        ({"ground_truth": "{'inputs': []}"}, "ground_truth is no JSON"),
        ({"ground_truth": "[]"}, "ground_truth "),
        ({"ground_truth": "[7]"}, r"ground_truth\[0\] "),
        ({"ground_truth": '[{"type": "math"}]'}, r"ground_truth\[0\]\.type='math'"),
        ({"ground_truth": '[{"type": "stdin", "input": "1"}]'}, r"ground_truth\[0\]\.output "),
        ({"ground_truth": json.dumps(lcb("functional", ("1", "2")))}, "ground_truth .*fn_name"),
        ({"ground_truth": json.dumps(lcb("stdin", ("1", "2")) + lcb("functional", ("1", "2")))}, "ground_truth mixes"),
        ({"inputs": ["1"]}, "outputs is missing"),
        ({"inputs": ["1"], "outputs": []}, "outputs "),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "outputs has 2 entries, inputs 1"),
        ({"inputs": [1], "outputs": ["1"]}, r"inputs\[0\] "),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "f(x)"}, r"fn_name='f\(x\)'"),
        ({"inputs": ["x"], "outputs": ["1"], "fn_name": "f"}, r"inputs\[0\] is no JSON"),
        ({"inputs": [3], "outputs": ["1"], "fn_name": "f"}, r"inputs\[0\] "),
        ({"entry_point": "f", "test": "def check(:"}, "test is no Python"),
        ({"entry_point": "f"}, "test is missing"),
        ({"entry_point": "f", "test": "", "prompt": [{}]}, "prompt "),
        ({"entry_point": "f g", "test": ""}, "entry_point='f g'"),
        ({"functional": "check("}, "functional is no Python"),
        ({"test_list": []}, "test_list "),
        ({"test_list": ["assert f("]}, r"test_list\[0\] is no Python"),
        ({"private_test_cases": "???"}, "private_test_cases "),
        ({"private_test_cases": packed(Command())}, r"private_test_cases .*posix\.system"),
    ],
)
def test_what_is_wrong_is_named(row: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CodeProblem.from_row(row)


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("One:\n```python\nprint(1)\n```\nbetter:\n```py\nprint(2)\n```\nand so", "print(2)\n"),
        ("<think>\n```python\nprint(1)\n```\n</think>\n```python\nprint(2)\n```", "print(2)\n"),
        ("<think>\n```python\nprint(1)\n```\n</think>\nNone.", None),
        ("1. so:\n   ```Python\n   x = 1\n   ```", "   x = 1\n"),
        ("```python\nprint('```')\n```", "print('```')\n"),
        ("```python\r\nprint(1)\r\n```\r\n", "print(1)\r\n"),
        ("```\nprint(1)\n```", None),
        ("```python\nprint(1)", None),
        ("```python\nprint(1)\n```\n```json\n{}\n```", "print(1)\n"),
        ("<think>\n```python\nprint(1)\n```\nbut", None),
        ("", None),
    ],
)
def test_the_last_block_is_the_program(response: str, program: str | None) -> None:
    assert extract_program(response) == program


def test_open_blocks_take_linear_time() -> None:
    """A pattern for a whole block takes a minute here, in which the trainer waits."""
    started = time.monotonic()
    assert extract_program("```python\n" * 20_000) is None
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n", "1 2", True),
        ("  1 2  \n3\n\n", "1 2\n3", True),
        ("1.50 2", "1.5 2.0", True),
        ("1e3", "1000", True),
        ("1\r\n2\r\n", "1\n2\n", True),
        ("1  2", "1 2", True),
        ("a  b", "a b", False),
        ("1\n\n2", "1\n2", False),
        ("1 2", "1\n2", False),
        ("50000000000000001", "50000000000000000", False),
        ("0.1000000001", "0.1", False),
        ("YES", "Yes", False),
        ("", "0", False),
        ("", "", True),
        ("nan", "nan", True),
        ("nan", "NaN", False),
        ("sNaN", "1", False),
        ("1 2 3", "1 2", False),
    ],
)
def test_outputs(output: str, expected: str, same: bool) -> None:
    assert same_output(output, expected) is same


def test_results() -> None:
    assert is_one_of((1, [2, (3,)]), [[1, [2, [3]]]])
    assert is_one_of({"a": (1,)}, [{"a": [1]}])
    assert not is_one_of("2", [2])
    assert not is_one_of({2}, [[2]])
    assert not is_one_of(None, [0])


def test_tests_are_drawn_by_the_seed() -> None:
    problem = CodeProblem("script", tuple((str(n), "") for n in range(50)))
    drawn = [problem.drawn(5, seed).tests for seed in range(20)]
    assert drawn == [problem.drawn(5, seed).tests for seed in range(20)]
    assert len(set(drawn)) == 20
    assert all(list(tests) == sorted(set(tests), key=lambda test: int(test[0])) and len(tests) == 5 for tests in drawn)
    assert problem.drawn(50, 0) is problem.drawn(None, 0) is problem


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -1, 2**53, -(10**5000), 0.1, -0.0, float("inf"), 1 - 2j),
        *("", 'a\nb"\\ü\ud800\U0001f600', b"\x00\xff", bytearray(b"z")),
        *([], (), {}, set(), frozenset({2.5}), range(3, 0, -1)),
        [1, (2, [3, (4,)]), {"a": {(1, "b"): [None]}, 2: {frozenset({1})}}],
        {"tuple": 1, "int": "0x1"},
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_come_through_with_their_types(value: Any) -> None:
    received = decode(json.loads(json.dumps(encode(value))))
    assert type(received) is type(value)
    assert received == value
    if not isinstance(value, int):
        assert repr(received) == repr(value)


def test_an_iterator_comes_through_as_one() -> None:
    received = decode(json.loads(json.dumps(encode(n * n for n in range(3)))))
    assert iter(received) is received
    assert list(received) == [0, 1, 4]


def test_other_values_do_not() -> None:
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    assert type(decode(json.loads(json.dumps(encode(Liar(3)))))) is int
    for value in (object(), Liar, len):
        with pytest.raises(TypeError, match="cannot pass between a program and its tests"):
            encode(value)
    for message in ({"object": 1}, {}, {"int": "0x1", "set": []}, {"tuple": 3}, {"set": [[]]}, {"bytes": 1}):
        with pytest.raises((ValueError, TypeError, KeyError)):
            decode(message)


@pytest.mark.parametrize(
    ("number", "arguments", "allowed"),
    [
        (0, (0, 0, 0), True),  # read
        (257, (0, 0, 0), True),  # openat to read
        (257, (0, 0, 0o2000000), True),
        (257, (0, 0, 1), False),  # to write
        (257, (0, 0, 0o100), False),  # to create
        (257, (0, 0, 0o1000), False),  # to truncate
        (2, (0, 0, 0), False),  # open
        (56, (0x3D0F00, 0, 0), True),  # clone of a thread
        (56, (0x01200011, 0, 0), False),  # fork
        (56, (0x3D0F00 | 0x10000000, 0, 0), False),  # a thread in a user namespace
        (57, (0, 0, 0), False),  # fork
        (59, (0, 0, 0), False),  # execve
        (302, (0, 0, 0), True),  # prlimit of itself
        (302, (1, 0, 0), False),
        (72, (0, 1, 0), True),  # fcntl F_GETFD
        (72, (0, 8, 0), False),  # F_SETOWN
        (16, (0, 0x5401, 0), True),  # ioctl TCGETS
        (16, (0, 0x5412, 0), False),  # TIOCSTI
        (41, (2, 1, 0), False),  # socket
        (62, (1, 9, 0), False),  # kill
        (101, (16, 1, 0), False),  # ptrace
        (425, (1, 0, 0), False),  # io_uring_setup
        (0x40000000, (0, 0, 0), False),  # read, of x32
    ],
)
def test_the_filter(number: int, arguments: tuple[int, ...], allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert run_filter(seccomp_filter(), 0xC000003E, number, arguments) == (0x7FFF0000 if allowed else 0x00050001)
    for other in (0x40000003, 0xC00000B7):  # i386, aarch64
        assert run_filter(seccomp_filter(), other, number, arguments) == 0x80000000  # killed


@pytest.mark.parametrize(
    ("number", "arguments", "allowed"),
    [
        (63, (0, 0, 0), True),  # read
        (56, (0, 0, 0), True),  # openat to read
        (56, (0, 0, 1), False),  # to write
        (56, (0, 0, 0o100), False),  # to create
        (220, (0x3D0F00, 0, 0), True),  # clone of a thread
        (220, (0x01200011, 0, 0), False),  # fork
        (221, (0, 0, 0), False),  # execve
        (261, (0, 0, 0), True),  # prlimit of itself
        (261, (1, 0, 0), False),
        (25, (0, 1, 0), True),  # fcntl F_GETFD
        (25, (0, 8, 0), False),  # F_SETOWN
        (29, (0, 0x5401, 0), True),  # ioctl TCGETS
        (29, (0, 0x5412, 0), False),  # TIOCSTI
        (198, (2, 1, 0), False),  # socket
        (129, (1, 9, 0), False),  # kill
        (117, (16, 1, 0), False),  # ptrace
        (279, (0, 0, 0), False),  # memfd_create
        (35, (0, 0, 0), False),  # unlinkat; nanosleep on x86-64
        (257, (0, 0, 0), False),  # openat on x86-64
    ],
)
def test_the_filter_of_aarch64(
    number: int, arguments: tuple[int, ...], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert run_filter(seccomp_filter(), 0xC00000B7, number, arguments) == (0x7FFF0000 if allowed else 0x00050001)
    assert run_filter(seccomp_filter(), 0xC000003E, number, arguments) == 0x80000000  # x86-64 is killed


def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(OSError, match="riscv64"):
        seccomp_filter()


def run_filter(code: bytes, architecture: int, number: int, arguments: tuple[int, ...]) -> int:
    """Interpret the four instructions of the filter as the kernel does."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    position, value = 0, 0
    while True:
        op, if_true, if_false, constant = struct.unpack_from("<HBBI", code, 8 * position)
        position += 1
        if op == 0x20:
            (value,) = struct.unpack_from("<I", data, constant)
        elif op == 0x06:
            return constant
        else:
            holds = value == constant if op == 0x15 else bool(value & constant)
            assert op in (0x15, 0x45)
            position += if_true if holds else if_false


@pytest.mark.parametrize(
    "values", [[], [1], [1, 2], [1, None, 2], [1, 2, 3, None, 4], [5, 4, 7, 3, None, 2, None, -1, None, 9]]
)
def test_trees_come_through(values: list[int | None]) -> None:
    tree = tree_node(values)
    assert tree_values(tree) == values
    assert tree_values(decode(json.loads(json.dumps(encode(tree))))) == values
    assert is_same_tree(tree, tree_node([*values, None]))
    assert not is_same_tree(tree, tree_node([0, *values]))


def test_the_places_in_a_tree() -> None:
    root = tree_node([1, 2, 3, None, 4])
    assert root is not None
    assert root.left is not None
    assert root.right is not None
    assert root.left.left is None
    assert root.left.right is not None
    assert (root.val, root.left.val, root.right.val, root.left.right.val) == (1, 2, 3, 4)
    root.right.left = root
    with pytest.raises(ValueError, match="a tree that does not end"):
        encode(root)


def test_linked_lists_come_through() -> None:
    head = list_node([3, 1, 2])
    assert list_values(decode(json.loads(json.dumps(encode(head))))) == [3, 1, 2]
    assert is_same_list(head, list_node([3, 1, 2]))
    assert not is_same_list(head, list_node([3, 1]))
    assert list_node([]) is None
