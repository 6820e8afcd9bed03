"""Helpers that tests may use: LeetCode's linked lists and binary trees, and the comparison of results. Used inside the
sandboxes, with the standard library alone."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing takes as long as starting Python
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_MOST = 1_000_000
"""Nodes of a list or tree. More of them form a circle."""


class ListNode:
    def __init__(self, val: Any = 0, next: ListNode | None = None):
        self.val = val
        self.next = next


class TreeNode:
    def __init__(self, val: Any = 0, left: TreeNode | None = None, right: TreeNode | None = None):
        self.val = val
        self.left = left
        self.right = right


def list_node(values: Iterable[Any]) -> ListNode | None:
    head = None
    for value in reversed(list(values)):
        head = ListNode(value, head)
    return head


def list_values(node: ListNode | None) -> list[Any]:
    """The inverse of `list_node`. Raises ValueError for a circle."""
    values: list[Any] = []
    while node is not None:
        values.append(node.val)
        node = node.next
        if len(values) > _MOST:
            raise ValueError("a linked list that does not end")
    return values


def tree_node(values: Iterable[Any]) -> TreeNode | None:
    """A tree from its rows, where None stands for a missing child. A missing child has no children in `values`."""
    rest = iter(values)
    first = next(rest, None)
    root = None if first is None else TreeNode(first)
    nodes = [] if root is None else [root]
    for node in nodes:  # grows in the loop
        for side in ("left", "right"):
            if (value := next(rest, None)) is not None:
                child = TreeNode(value)
                setattr(node, side, child)
                nodes.append(child)
    return root


def tree_values(root: TreeNode | None) -> list[Any]:
    """The inverse of `tree_node`. Raises ValueError for a circle."""
    nodes, values = [root], []
    for node in nodes:
        values.append(None if node is None else node.val)
        if node is not None:
            nodes += [node.left, node.right]
        if len(nodes) > _MOST:
            raise ValueError("a tree that does not end")
    while values and values[-1] is None:
        values.pop()
    return values


def is_same_list(a: ListNode | None, b: ListNode | None) -> bool:
    return list_values(a) == list_values(b)


def is_same_tree(a: TreeNode | None, b: TreeNode | None) -> bool:
    return tree_values(a) == tree_values(b)


def is_one_of(result: Any, acceptable: list[Any]) -> bool:
    """Whether a result equals one of the acceptable ones, which come from JSON: tuples count as lists."""
    return any(_as_lists(result) == expected for expected in acceptable)


def _as_lists(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_lists(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return value
