"""Programming problems with tests, in the formats of public data sets."""

from __future__ import annotations

import ast
import base64
import binascii
import dataclasses
import io
import json
import pickle
import random
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_aspo.config.rules import require

_NODES = "megatron_aspo.rewards.programs.inside.nodes"
COMMON_NAMES = {
    "typing": "Any Callable Deque Dict Iterable Iterator List Optional Sequence Set Tuple Union",
    "collections": "Counter OrderedDict defaultdict deque namedtuple",
    "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort",
    "itertools": "accumulate chain combinations count cycle groupby pairwise permutations product zip_longest",
    "functools": "cache cmp_to_key lru_cache reduce",
    "math": "ceil comb factorial floor gcd inf isqrt lcm log log2 perm pi sqrt",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits",
    "copy": "deepcopy",
    "datetime": "timedelta",
    "random": "randint",
    _NODES: "ListNode TreeNode is_same_list is_same_tree list_node tree_node",
}
"""Names that programs use without importing them, because many judges import them beforehand."""

_SCRIPT_TYPES, _FUNCTION_TYPES = ("stdin_stdout", "stdin"), ("function_call", "functional")


def common_imports(code: str) -> str:
    """Import statements for the common names in `code`."""
    words = set(re.findall(r"\w+", code))
    statements = [f"import {module}" for module in COMMON_NAMES if module in words]
    for module, names in COMMON_NAMES.items():
        if used := words.intersection(names.split()):
            statements.append(f"from {module} import {', '.join(sorted(used))}")
    return "\n".join(statements)


@dataclass(frozen=True)
class CodeProblem:
    """The tests of a problem.

    Attributes:
        kind: "script": the program reads standard input and writes standard output. "tests": Python code calls its
            functions, by their names or as methods of `Solution()`, and raises where they are wrong.
        tests: (input, output) for a script, else source code.
        prelude: definitions for the program and its tests, such as those in HumanEval's prompts.
    """

    kind: Literal["script", "tests"]
    tests: tuple[Any, ...]
    prelude: str = ""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> CodeProblem:
        """Read a row of HumanEval (`prompt`, `test`, `entry_point`), MBPP (`test_list`), LiveCodeBench
        (`public_test_cases`, `private_test_cases`, `metadata`), or one whose `reward_model.ground_truth` or
        `ground_truth` is one of those or JSON of `{"inputs", "outputs", "fn_name"}`, of `{"functional"}` (a test as
        LeetCodeDataset and Archer have it) or of a list of `{"type", "input", "output", "fn_name"}` or of assertions.

        Raises:
            ValueError: the row is none of those; names the field at fault.
        """
        if "reward_model" in row:
            return _from_truth(_field(row["reward_model"], "ground_truth", "reward_model."), "ground_truth")
        for name in ("ground_truth", "input_output"):
            if name in row:
                return _from_truth(row[name], name)
        if "entry_point" in row:
            return _from_check(row)
        if "test_list" in row:
            setup = "\n".join([*_json(row.get("test_imports") or [], "test_imports"), row.get("test_setup_code") or ""])
            return _from_assertions(_json(row["test_list"], "test_list"), "test_list", setup)
        if "public_test_cases" in row or "private_test_cases" in row:
            public = _json(row.get("public_test_cases") or [], "public_test_cases")
            private = _private(row.get("private_test_cases") or [])
            metadata = _json(row.get("metadata") or {}, "metadata")
            return _from_cases([*public, *private], "public_test_cases", metadata.get("func_name"))
        if "inputs" in row:
            return _from_lists(row)
        if "functional" in row:
            test = _source(row["functional"], "functional")
            return cls("tests", (f"{common_imports(test)}\n{test}",))
        raise ValueError(
            "no tests: needs entry_point and test, test_list, public_test_cases, input_output, inputs and outputs, "
            "functional, or reward_model.ground_truth"
        )

    def drawn(self, count: int | None, seed: int) -> CodeProblem:
        """The problem with at most `count` of its tests, drawn by the seed and in their order."""
        if count is None or len(self.tests) <= count:
            return self
        drawn = random.Random(seed).sample(range(len(self.tests)), count)
        return dataclasses.replace(self, tests=tuple(self.tests[i] for i in sorted(drawn)))


def _from_truth(truth: Any, name: str) -> CodeProblem:
    truth = _json(truth, name)
    if isinstance(truth, Mapping):
        return CodeProblem.from_row(truth)
    if isinstance(truth, list) and truth and all(isinstance(case, str) for case in truth):
        if len(truth) == 1 and truth[0].lstrip()[:1] in ("{", "["):
            return _from_truth(truth[0], name)  # JSON in a list, as answers of mathematics are lists
        return _from_assertions(truth, name)
    return _from_cases(truth, name)


def _from_check(row: Mapping[str, Any]) -> CodeProblem:
    name = _name(row["entry_point"], "entry_point")
    test = _source(_field(row, "test"), "test")
    prelude = _definitions(_text(row["prompt"], "prompt"), without=name) if "prompt" in row else ""
    return CodeProblem("tests", (f"{test}\ncheck({name})\n",), prelude)


def _definitions(prompt: str, without: str) -> str:
    """The prompt if it is code with definitions only, less the function that the program is to define. Else nothing."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for code in (prompt, f"{prompt}\n    pass\n"):  # the last function may lack a body
        try:
            statements = ast.parse(code).body
        except (SyntaxError, ValueError, RecursionError):
            continue
        if not all(isinstance(statement, kinds) for statement in statements):
            return ""
        return "\n".join(ast.unparse(node) for node in statements if getattr(node, "name", "") != without)
    return ""


def _from_assertions(tests: Any, name: str, setup: str = "") -> CodeProblem:
    require(isinstance(tests, list) and bool(tests), f"{name} is no list of assertions, or is empty")
    sources = [_source(test, f"{name}[{i}]") for i, test in enumerate(tests)]
    return CodeProblem("tests", tuple(f"{setup}\n{source}" for source in sources) if setup.strip() else tuple(sources))


def _from_cases(cases: Any, name: str, function: str | None = None) -> CodeProblem:
    """The problem of a list of objects, one for each test."""
    require(isinstance(cases, list) and bool(cases), f"{name} holds no tests")
    called, inputs, outputs = set(), [], []
    for i, case in enumerate(cases):
        where = f"{name}[{i}]"
        require(isinstance(case, Mapping), f"{where} is no object")
        kind = case.get("type", case.get("testtype"))
        known = (*_SCRIPT_TYPES, *_FUNCTION_TYPES)
        require(kind in known, f"{where}.type={kind!r} is not one of {', '.join(known)}")
        by_name = case.get("fn_name") or (case.get("metadata") or {}).get("func_name") or function
        called.add(by_name if kind in _FUNCTION_TYPES else "")
        inputs.append(_field(case, "input", f"{where}."))
        outputs.append(_field(case, "output", f"{where}."))
    require(len(called) == 1, f"{name} mixes types of tests, or functions")
    require(None not in called, f"{name} calls a function without its name: needs fn_name, or metadata.func_name")
    return _from_lists({"inputs": inputs, "outputs": outputs, "fn_name": called.pop()})


def _from_lists(row: Mapping[str, Any]) -> CodeProblem:
    """The problem of a list of inputs and a list of outputs."""
    inputs, outputs = (_json(_field(row, name), name) for name in ("inputs", "outputs"))
    for name, values in (("inputs", inputs), ("outputs", outputs)):
        require(isinstance(values, list) and bool(values), f"{name} is no list, or is empty")
    require(len(inputs) == len(outputs), f"outputs has {len(outputs)} entries, inputs {len(inputs)}")
    pairs = list(enumerate(zip(inputs, outputs, strict=True)))
    if not row.get("fn_name"):
        tests = [(_lines(text, f"inputs[{i}]"), _lines(expected, f"outputs[{i}]")) for i, (text, expected) in pairs]
        return CodeProblem("script", tuple(tests))
    name = _name(row["fn_name"], "fn_name")
    return CodeProblem("tests", tuple(_call(name, i, *pair) for i, pair in pairs))


def _call(name: str, i: int, arguments: Any, expected: Any) -> str:
    """A test of one call. Values stay JSON, because Python compiles large literals slowly."""
    acceptable = [expected]
    if isinstance(arguments, str):  # one argument a line, in LiveCodeBench
        arguments = [_json(line, f"inputs[{i}]") for line in arguments.split("\n")]
        acceptable = [_json(expected, f"outputs[{i}]")]
    elif isinstance(expected, list) and len(expected) == 1:
        acceptable.append(expected[0])  # APPS wraps some results in a list
    require(isinstance(arguments, list), f"inputs[{i}] is neither a list of arguments nor text with one a line")
    return (
        f"from json import loads\nfrom {_NODES} import is_one_of\nresult = Solution().{name}(*loads("
        f'{json.dumps(arguments)!r}))\nassert is_one_of(result, loads({json.dumps(acceptable)!r})), "wrong answer"'
    )


def _private(value: Any) -> list[Any]:
    """LiveCodeBench's hidden tests: JSON, or a base64 text of a compressed pickle of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        text = _TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(value, validate=True)))).load()
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"private_test_cases is neither JSON nor base64 of a packed pickle of it ({error})") from error
    return _json(text, "private_test_cases")


class _TextUnpickler(pickle.Unpickler):
    """Refuses classes and functions: with them a pickle can run any code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")


# Fields


def _field(row: Any, name: str, prefix: str = "") -> Any:
    require(isinstance(row, Mapping) and name in row, f"{prefix}{name} is missing")
    return row[name]


def _text(value: Any, name: str) -> str:
    require(isinstance(value, str), f"{name} is no text")
    return value


def _name(value: Any, name: str) -> str:
    require(_text(value, name).isidentifier(), f"{name}={value!r} is no name of a function")
    return value


def _lines(value: Any, name: str) -> str:
    lines = [value] if isinstance(value, str) else value
    right = isinstance(lines, list) and all(isinstance(line, str) for line in lines)
    require(right, f"{name} is neither text nor a list of lines")
    return "\n".join(lines)


def _json(value: Any, name: str) -> Any:
    """The value, parsed if it is text."""
    if not isinstance(value, (str, bytes)):
        return value.tolist() if hasattr(value, "tolist") else value  # arrays of pyarrow and numpy
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON ({error})") from error


def _source(code: Any, name: str) -> str:
    try:
        ast.parse(_text(code, name))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no Python ({error})") from error
    return code
