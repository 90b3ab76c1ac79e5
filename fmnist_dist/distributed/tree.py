"""The one binary tree in which everything is added, whatever the world size.

Leaves are the V logical shards. A node covers [start, start + size) for a power of two `size`; its
value is the sum of its two children, or that of the left one where no leaf lies under the right.
Floating-point addition is not associative, so a sum has the same bits on 1, 2, 3 or 8 ranks only if
the *same* additions are made: each rank makes those inside its own range (`Carry`), the others are
made from the subtree roots that the ranks own (`combine`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")
Add = Callable[[Value, Value], Value]


@dataclass(frozen=True, slots=True)
class Node:
    start: int
    size: int  # a power of two

    @property
    def stop(self) -> int:
        return self.start + self.size


def root(leaves: int) -> Node:
    return Node(0, 1 << (leaves - 1).bit_length())


def owned(shards: range, *, leaves: int) -> list[Node]:
    """Return the largest nodes whose leaves all lie in a contiguous range, from left to right."""
    found: list[Node] = []
    pending = [root(leaves)]
    while pending:
        node = pending.pop()
        last = min(node.stop, leaves)
        if node.start >= leaves or node.start >= shards.stop or last <= shards.start:
            continue
        if shards.start <= node.start and last <= shards.stop:
            found.append(node)
            continue
        half = node.size // 2
        pending += [Node(node.start + half, half), Node(node.start, half)]
    return found


class Carry(Generic[Value]):
    """Adds a rank's leaves as they come, like a binary counter: few values are alive at once."""

    def __init__(self, *, leaves: int, add: Add[Value]) -> None:
        self._leaves = leaves
        self._add = add
        self.nodes: list[tuple[Node, Value]] = []

    def push(self, leaf: int, value: Value) -> None:
        """Add the next leaf of a contiguous range. Left operands are older: `add(left, right)`."""
        self.nodes.append((Node(leaf, 1), value))
        top = root(self._leaves)
        while self.nodes[-1][0] != top:
            node, newest = self.nodes[-1]
            is_right = node.start % (2 * node.size) != 0
            if is_right:
                left = Node(node.start - node.size, node.size)
                if len(self.nodes) < 2 or self.nodes[-2][0] != left:  # noqa: PLR2004
                    return
                _, older = self.nodes[-2]
                self.nodes[-2:] = [(Node(left.start, 2 * left.size), self._add(older, newest))]
            elif node.stop >= self._leaves:  # no leaf under the right sibling: carried up as it is
                self.nodes[-1] = (Node(node.start, 2 * node.size), newest)
            else:
                return


def combine(values: Mapping[Node, Value], *, leaves: int, add: Add[Value]) -> Value:
    """Return the root's value from nodes that together cover all leaves once."""

    def value_of(node: Node) -> Value:
        if node in values:
            return values[node]
        half = node.size // 2
        left = value_of(Node(node.start, half))
        right = Node(node.start + half, half)
        return left if right.start >= leaves else add(left, value_of(right))

    return value_of(root(leaves))
