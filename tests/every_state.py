"""Searches through every state that a world can reach.

From the first state, each thing that may happen next leads to a next state; states seen before are
not gone into again. So every order of all events is tried, and none is run twice.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

State = TypeVar("State", bound=Hashable)


class Violation(AssertionError):  # noqa: N818 - a finding
    """An invariant does not hold; the notes tell every event that led there."""


def visit(
    first: State, following: Callable[[State], Sequence[tuple[str, State]]], *, states_max: int
) -> int:
    """Visit all states, depth first, and return how many there are.

    `following` returns what may happen in a state and to which it leads, and raises `Violation`
    where the state is wrong. To come back to a state is one too: nothing says that this ends.
    States are remembered by their 64-bit hashes.
    """
    seen, above = set[int](), set[int]()  # states; those of them on the present path
    path: list[tuple[str, int, Iterator[tuple[str, State]]]] = []
    path.append(("", 0, iter([("the start", first)])))
    label = ""
    try:
        while path:
            label, state = next(path[-1][2], ("", first))
            if not label:
                above.discard(path.pop()[1])
                continue
            key = hash(state)
            if key in above:
                raise Violation("it goes round for ever")  # noqa: TRY301 - notes are put on it below
            if key not in seen:
                seen.add(key)
                assert len(seen) <= states_max, f"more than {states_max} states"
                events = following(state)
                above.add(key)
                path.append((label, key, iter(events)))
    except Exception as error:
        error.add_note("\n".join([*(each for each, _, _ in path[1:]), label]))
        raise
    return len(seen)
