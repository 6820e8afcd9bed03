"""The three kinds of jobs, as their processes run them: a script, calls from tests, and tests.

Reports and calls are JSON. Only the standard library is imported.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import sys
import time
import types

from megatron_aspo.rewards.programs.inside.wire import decode, encode

TYPE_CHECKING = False  # importing typing takes as long as starting Python
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, BinaryIO, NoReturn

REPORT, CALLS_IN, CALLS_OUT = 3, 4, 5
"""Descriptors of a job's process: its report, and the pipes to the other sandbox."""
PROGRAM_ENDED = "the program ended during a call"


def run_script(job: dict[str, Any]) -> None:
    """Run a program that reads standard input and writes standard output."""
    namespace = new_module("__main__")
    execute(job["prelude"], namespace)
    execute(job["program"], namespace)


def serve_calls(job: dict[str, Any]) -> None:
    """Answer the calls that tests in another sandbox make of the program's functions."""
    namespace = new_module("solution")
    execute(job["prelude"], namespace)
    execute(job["program"], namespace)
    with open(CALLS_IN, "rb") as requests:
        for line in requests:
            limit_call(job["call_seconds"])
            say(CALLS_OUT, answer(json.loads(line), namespace))


def answer(request: dict[str, Any], namespace: dict[str, Any]) -> dict[str, Any]:
    arguments = decode(request["arguments"])
    try:
        result = find(namespace, request["function"])(*arguments, **decode(request["keywords"]))
        reply = {"result": encode(result)}
        after = encode(arguments)
        if after != request["arguments"]:
            reply["arguments"] = after
        return reply
    except Exception as error:
        kinds = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
        return {"error": next(kinds), "message": message(error)}


def run_tests(job: dict[str, Any]) -> None:
    """Run tests of a program that is in another sandbox."""
    passed, reason = 0, ""
    with open(CALLS_IN, "rb") as replies:
        program = RemoteProgram(replies, job["limits"]["output"])
        namespace = Names(program)
        execute(job["prelude"], namespace)
        try:
            for test in job["tests"]:
                execute(test, namespace)
                passed += 1
        except Exception as error:
            reason = explain(error)
    if not (reason or program._called):  # any program would pass
        passed, reason = 0, "the tests call no function of the program"
    say(REPORT, {"passed": passed, "reason": reason})


JOBS: dict[str, Callable[[dict[str, Any]], None]] = {"script": run_script, "serve": serve_calls, "tests": run_tests}


class Names(dict[str, "Any"]):
    """The names of the tests' module. A name that is not defined there is the program's function."""

    def __init__(self, program: RemoteProgram):
        super().__init__(vars(builtins) | {"__name__": "tests", "Solution": program})
        self._program = program

    def __missing__(self, name: str) -> Any:
        if name.startswith("__"):
            raise KeyError(name)
        return getattr(self._program, name)


class RemoteProgram:
    """The program in the other sandbox, and its class Solution. Its functions take and return plain values. A list,
    dict or set that they change in place is changed here too. An exception is raised as the nearest built-in one."""

    def __init__(self, replies: BinaryIO, limit: int):
        self._replies, self._limit, self._called = replies, limit, False

    def __call__(self) -> RemoteProgram:
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            request = {"function": name, "arguments": encode(list(arguments)), "keywords": encode(keywords)}
            result, after, error = self._reply(request)
            if error is not None:
                raise error
            for argument, changed in zip(arguments, after, strict=False):
                if isinstance(argument, list):
                    argument[:] = changed
                elif isinstance(argument, (dict, set)):
                    argument.clear()
                    argument.update(changed)
            return result

        return call

    def _reply(self, request: dict[str, Any]) -> tuple[Any, list[Any], Exception | None]:
        self._called = True
        try:
            say(CALLS_OUT, request)
            line = self._replies.readline(self._limit)
        except BrokenPipeError:
            line = b""
        if not line:
            fail(PROGRAM_ENDED)
        if not line.endswith(b"\n"):
            fail("the program returned too much")
        try:
            reply = json.loads(line)
            if "error" in reply:
                return None, [], self._error(reply)
            return decode(reply["result"]), decode(reply.get("arguments", [])), None
        except Exception:  # not raised: a test could catch it
            fail("the program sent what is no reply")

    @staticmethod
    def _error(reply: dict[str, Any]) -> Exception:
        kind = getattr(builtins, reply["error"])
        if not issubclass(kind, Exception):
            raise ValueError(f"{kind} is no Exception")
        if issubclass(kind, (StopIteration, StopAsyncIteration)):
            # It would end a loop over the tests as if all had passed.
            return RuntimeError(f"the program raised {reply['error']}")
        try:
            return kind(str(reply["message"]))
        except TypeError:  # UnicodeDecodeError and the like take more
            return RuntimeError(str(reply["message"]))


def new_module(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses and pickle look for it
    return module.__dict__


def execute(source: str, namespace: dict[str, Any]) -> None:
    exec(compile(source, "<program>", "exec", dont_inherit=True), namespace)


def find(namespace: dict[str, Any], name: str) -> Callable[..., Any]:
    """A method of the program's class Solution, or one of its functions."""
    solution = namespace.get("Solution")
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    if callable(namespace.get(name)):
        return namespace[name]
    raise NameError(f"the program does not define {name}")


def limit_call(seconds: int) -> None:
    """End this process once it has used `seconds` more of CPU time. A program can undo it; the limit of the job it
    cannot."""
    limit = int(time.process_time()) + 1 + seconds
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (min(limit, most), most))


def say(target: int, message: dict[str, Any]) -> None:
    os.write(target, json.dumps(message).encode() + b"\n")


def message(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except Exception:
        return ""


def explain(error: BaseException) -> str:
    return ": ".join(filter(None, (type(error).__name__, message(error))))


def fail(reason: str) -> NoReturn:
    """End this process at once. An exception could be caught."""
    say(REPORT, {"reason": reason})
    os._exit(1)
