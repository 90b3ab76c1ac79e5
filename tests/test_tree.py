"""One tree of additions whatever the world size, checked on the additions themselves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmnist_dist.distributed.tree import Carry, Node, combine, owned, root
from fmnist_dist.plan import shards_of_rank

MOST_SHARDS = 20


def add(left: str, right: str) -> str:
    """Add as floating-point numbers do: neither the order nor the brackets may change."""
    return f"({left}+{right})"


def carried(shards: range, *, leaves: int) -> Carry[str]:
    carry: Carry[str] = Carry(leaves=leaves, add=add)
    for shard in shards:
        carry.push(shard, str(shard))
    return carry


def added_by(world_size: int, *, leaves: int) -> str:
    """Return the sum as `world_size` ranks make it."""
    values: dict[Node, str] = {}
    for rank in range(world_size):
        shards = shards_of_rank(rank, world_size=world_size, logical_shards=leaves)
        values |= dict(carried(shards, leaves=leaves).nodes)
    return combine(values, leaves=leaves, add=add)


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        (1, "0"),
        (2, "(0+1)"),
        (3, "((0+1)+2)"),
        (5, "(((0+1)+(2+3))+4)"),
        (6, "(((0+1)+(2+3))+(4+5))"),
        (8, "(((0+1)+(2+3))+((4+5)+(6+7)))"),
    ],
)
def test_one_rank_adds_in_a_tree(leaves: int, expected: str) -> None:
    assert added_by(1, leaves=leaves) == expected


@pytest.mark.parametrize("leaves", range(1, MOST_SHARDS + 1))
def test_every_world_size_makes_the_same_additions(leaves: int) -> None:
    assert {added_by(size, leaves=leaves) for size in range(1, leaves + 1)} == {
        added_by(1, leaves=leaves)
    }


@pytest.mark.parametrize("leaves", range(1, MOST_SHARDS + 1))
def test_a_rank_ends_with_the_largest_subtrees_of_its_range_in_order(leaves: int) -> None:
    for start in range(leaves):
        for stop in range(start + 1, leaves + 1):
            nodes = [node for node, _ in carried(range(start, stop), leaves=leaves).nodes]
            assert nodes == owned(range(start, stop), leaves=leaves)
            covered = [leaf for each in nodes for leaf in range(each.start, min(each.stop, leaves))]
            assert covered == list(range(start, stop))


@given(st.integers(1, 5000), st.data())
def test_few_values_are_alive_at_once(leaves: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, leaves - 1))
    stop = data.draw(st.integers(start + 1, min(leaves, start + 300)))
    carry: Carry[int] = Carry(leaves=leaves, add=lambda left, right: left + right)
    for leaf in range(start, stop):
        carry.push(leaf, 1)
        assert len(carry.nodes) <= 2 * math.ceil(math.log2(stop - start + 1))
    assert sum(value for _, value in carry.nodes) == stop - start


def test_one_rank_alone_holds_no_more_values_than_its_counter_has_digits() -> None:
    carry: Carry[int] = Carry(leaves=1024, add=lambda left, right: left + right)
    for leaf in range(1024):
        carry.push(leaf, 1)
        assert len(carry.nodes) == (leaf + 1).bit_count()
    assert carry.nodes == [(root(1024), 1024)]


def test_every_leaf_counts_once_however_a_world_is_cut() -> None:
    leaves = 11
    for cuts in range(1 << (leaves - 1)):
        stops = [leaf + 1 for leaf in range(leaves - 1) if cuts >> leaf & 1] + [leaves]
        values = {
            node: min(node.stop, leaves) - node.start
            for start, stop in zip([0, *stops], stops, strict=False)
            for node in owned(range(start, stop), leaves=leaves)
        }
        assert combine(values, leaves=leaves, add=lambda left, right: left + right) == leaves
