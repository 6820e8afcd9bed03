"""Values as JSON, for calls between a program and the tests in another sandbox.

Both sides use it, with the standard library alone. It is not pickle, because a program can write anything to the pipe.
"""

from __future__ import annotations

from megatron_aspo.rewards.programs.inside.nodes import list_node, list_values, tree_node, tree_values

TYPE_CHECKING = False  # importing typing takes as long as starting Python
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_EXACT_IN_JSON = 2**53
"""Larger integers are sent as hexadecimal digits, because Python limits the length of decimal ones."""


def encode(value: Any) -> Any:
    """A plain value as JSON. Types that JSON lacks become {name of the type: list of parts}.

    Raises:
        TypeError: the value is of no built-in type, and no ListNode or TreeNode.
        ValueError: nodes form a circle.
    """
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return value if -_EXACT_IN_JSON < value < _EXACT_IN_JSON else {"int": [hex(value)]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    for kind in (tuple, set, frozenset, bytes, bytearray):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    # By name, because a program may define its own.
    if (name := type(value).__name__) in _NODES:
        return {name: [encode(item) for item in _NODES[name](value)]}
    if hasattr(value, "__next__"):
        return {"iterator": [encode(item) for item in value]}
    raise TypeError(f"a value of type {name} cannot pass between a program and its tests")


_NODES: dict[str, Callable[[Any], list[Any]]] = {"ListNode": list_values, "TreeNode": tree_values}
_FROM_PARTS: dict[str, Callable[[list[Any]], Any]] = {
    "int": lambda parts: int(parts[0], 16),
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    **{kind.__name__: kind for kind in (dict, tuple, set, frozenset, bytes, bytearray)},
    "iterator": iter,
    "ListNode": list_node,
    "TreeNode": tree_node,
}


def decode(value: Any) -> Any:
    """The inverse of `encode`. The result has built-in types and nodes only, whatever the sender wrote.

    Raises:
        ValueError, TypeError, KeyError, OverflowError, RecursionError: `encode` does not return such a value.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        ((kind, parts),) = value.items()
        return _FROM_PARTS[kind]([decode(part) for part in parts])
    return value
