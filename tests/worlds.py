"""A state of a small world: its keepers and trainers, their store, and groups of connections."""

from typing import Any, NamedTuple

from every_state import Violation
from generations import Answers, Held

from fmnist_dist.distributed.generation import NUMBER

Name = tuple[int, tuple[str, ...]]  # of a group: generation and the incarnations in it
Operation = tuple[Any, ...]
Item = tuple[str, str]


class Trainer(NamedTuple):
    incarnation: str
    start: Held  # what it held when this round began
    held: Held
    lost: bool = False  # it is not the first of its rank
    draining: bool = False
    answers: Answers = ()
    met: Name | None = None
    inside: bool = False  # of the group of that name
    done: int = 0  # how many of its collectives have ended here


class Keeper(NamedTuple):
    """A keeper whose trainer has died."""

    failed: int
    for_good: bool
    answers: Answers = ()


class Group(NamedTuple):
    entered: tuple[int, ...]  # by rank: how many collectives it has entered
    collectives: tuple[tuple[str, bytes], ...] = ()  # in their order: what, and what was sent
    cut: bool = False


class World(NamedTuple):
    """A state. Tuples are by rank."""

    trainers: tuple[Trainer | None, ...]
    keepers: tuple[Keeper | None, ...]  # None: it waits for its trainer
    ended: tuple[tuple[str, int, bool] | None, ...]  # outcome, step, whether it was forked again
    slots: tuple[Held, ...]
    boards: tuple[int, ...]
    forks: tuple[int, ...]
    failures: int  # that may still happen
    store: frozenset[Item] = frozenset()
    groups: frozenset[tuple[Name, Group]] = frozenset()
    met: frozenset[Name] = frozenset()
    late: frozenset[Operation] = frozenset()  # writes of the dead, on their way


def put(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def fewer(world: World) -> World:
    return world._replace(failures=world.failures - 1)


def answered(world: World, rank: int, trainer: Trainer, answer: Any) -> World:
    return with_trainer(world, rank, trainer._replace(answers=(*trainer.answers, answer)))


def with_trainer(world: World, rank: int, trainer: Trainer | None) -> World:
    """Return the world with another trainer, and without groups in which nobody is any more."""
    trainers = put(world.trainers, rank, trainer)
    inside = {each.met for each in trainers if each is not None and each.inside}
    groups = world.groups
    if any(name not in inside for name, _ in groups):
        groups = frozenset(each for each in groups if each[0] in inside)
    return world._replace(trainers=trainers, groups=groups)


def entered(group: Group, rank: int, what: str, payload: bytes) -> Group:
    number = group.entered[rank]
    known = group.collectives
    if number == len(known):
        known = (*known, (what, payload))
    elif known[number][0] != what:
        raise Violation(f"rank {rank} enters {what}, and others {known[number][0]}")
    elif payload:
        known = put(known, number, (what, payload))
    return group._replace(entered=put(group.entered, rank, number + 1), collectives=known)


def with_group(world: World, name: Name, group: Group) -> World:
    return world._replace(groups=frozenset({**dict(world.groups), name: group}.items()))


def without_past(world: World) -> World:
    """Return the world without what lies in generations that nobody will look at any more."""
    now = max((int(value) for key, value in world.store if key == NUMBER), default=0)
    ranks = zip(world.boards, world.trainers, strict=True)
    oldest = min([now, *(board for board, each in ranks if each is not None)])
    past = {
        (key, value)
        for key, value in world.store
        if key.startswith("g/") and int(key.split("/")[1]) < oldest
    }
    met = frozenset(each for each in world.met if each[0] >= oldest)
    return world._replace(store=world.store - past, met=met) if past else world
