"""Searches through every state that a small world of keepers and trainers can reach.

1. From the first state, each next operation of each actor, and each failure while some are left,
   leads to a next state; states that were seen before are not gone into again. What is explored is
   bounded by the number of failures, and in larger worlds by that of preemptions (switches from an
   actor that could go on); within these bounds it is complete.
2. To look where nothing has changed is not an operation: who waits for what nobody will bring is
   stuck. A failure is nothing to count on: a world that needs one to go on is stuck too.
3. Where an actor's next operation commutes with all that others may do, only that operation and
   the actor's own failures are gone into. For the same reason nobody dies just before a read:
   what others see is what they see of a death just after it.

Simplified: a look at the store forgets the looks before it, as the loops of production code do
(`Scene.exact` forgets nothing), and members of a broken group know that at once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from generations import CHUNKS, NOTHING, READS, Answers, Ask, Desk, Held, Process, Scene
from generations import Violation, train

from fmnist_dist.distributed import generation
from fmnist_dist.distributed.generation import LEFT, NUMBER, Lost

Name = tuple[int, tuple[str, ...]]  # of a group: generation and the incarnations in it


class Trainer(NamedTuple):
    incarnation: str
    start: Held  # what it held when this round began
    held: Held
    lost: bool = False  # it is not the first of its rank
    draining: bool = False
    answers: Answers = ()
    met: Name | None = None
    inside: bool = False  # of the group of that name


class Keeper(NamedTuple):
    """A keeper whose trainer has died."""

    failed: int
    for_good: bool
    answers: Answers = ()


class Group(NamedTuple):
    entered: tuple[int, ...]  # by rank: the newest collective that it has entered
    sent: tuple[tuple[int, bytes], ...] = ()  # by collective
    cut: bool = False


class World(NamedTuple):
    store: frozenset[tuple[str, str]]
    trainers: tuple[Trainer | None, ...]
    keepers: tuple[Keeper | None, ...]  # None: it waits for its trainer
    boards: tuple[int, ...]
    slots: tuple[Held, ...]
    ended: tuple[tuple[str, int, bool] | None, ...]  # by rank: outcome, step, whether forked again
    forks: tuple[int, ...]
    groups: frozenset[tuple[Name, Group]] = frozenset()
    met: frozenset[Name] = frozenset()
    late: frozenset[tuple[Any, ...]] = frozenset()  # writes of the dead, on their way
    failures: int = 0  # that may still happen
    preemptions: int = 0  # that may still happen
    current: int | None = None  # which actor had the last turn


class Step(NamedTuple):
    label: str
    world: World
    actor: int | None = None  # trainers, then keepers; None: a failure, or the network
    sure: bool = True  # a failure is not


class Search:
    """All states of one scene."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.states = 0
        self.ends: set[tuple[str, ...]] = set()  # how it ended, by rank
        self._asked: dict[Any, Ask] = {}
        self._stores: dict[frozenset[tuple[str, str]], dict[str, str]] = {}

    def run(self, *, states_max: int = 2_000_000) -> "Search":
        """Visit all states. Raises `Violation` with the way to the first bad one."""
        scene, seen = self.scene, set[int]()
        held = scene.held or (NOTHING,) * scene.size
        nobody = (None,) * scene.size
        first = World(
            store=frozenset(),
            trainers=tuple(Trainer(f"{rank}.1", each, each) for rank, each in enumerate(held)),
            keepers=nobody,
            boards=(0,) * scene.size,
            slots=held,
            ended=nobody,
            forks=(1,) * scene.size,
            failures=scene.failures,
            preemptions=scene.preemptions or 0,
        )
        path: list[tuple[str, int, Iterator[Step]]] = [("", 0, iter([Step("start", first)]))]
        above = set[int]()  # the states on this path
        try:
            while path:
                step = next(path[-1][2], None)
                if step is None:
                    above.discard(path.pop()[1])
                    continue
                key = hash(step.world)
                if key in above:
                    raise Violation(f"goes round for ever: {step.label}")
                if key not in seen:
                    seen.add(key)
                    above.add(key)
                    assert len(seen) <= states_max, f"more than {states_max} states"
                    path.append((step.label, key, iter(())))
                    path[-1] = (step.label, key, iter(self._steps(step.world)))
        except Violation as violation:
            violation.add_note("\n".join(label for label, _, _ in path))
            raise
        self.states = len(seen)
        return self

    def _steps(self, world: World) -> list[Step]:
        steps: list[Step] = []
        for rank in range(self.scene.size):
            own, alone = self._of_trainer(world, rank)
            if own and alone:
                return own
            steps += own
        for rank in range(self.scene.size):
            own, alone = self._of_keeper(world, rank)
            if own and alone:
                return own
            steps += own
        for write in world.late:
            after = self._write(world, write)[0]._replace(late=world.late - {write})
            steps.append(Step(f"    arrives late: {write}", after))
        if not any(each.sure for each in steps):
            self._check_end(world)
        for name, group in world.groups:
            if "cut" in self.scene.kinds and world.failures and not group.cut:
                after = _with_group(world, name, group._replace(cut=True))
                after = after._replace(failures=world.failures - 1)
                steps.append(Step(f"    cut: {name}", after, sure=False))
        return steps if self.scene.preemptions is None else self._affordable(world, steps)

    @staticmethod
    def _affordable(world: World, steps: list[Step]) -> list[Step]:
        """Return the steps that the preemptions left allow, with what they cost."""
        goes_on = any(each.actor == world.current for each in steps if each.actor is not None)
        found = []
        for step in steps:
            cost = int(goes_on and step.actor not in {None, world.current})
            if cost <= world.preemptions:
                current = world.current if step.actor is None else step.actor
                after = step.world._replace(current=current, preemptions=world.preemptions - cost)
                found.append(step._replace(world=after))
        return found

    def _of_trainer(self, world: World, rank: int) -> tuple[list[Step], bool]:
        """Return what a trainer may do next, and whether nothing else need be tried."""
        trainer = world.trainers[rank]
        if trainer is None:
            return [], False
        ask = self._next(rank, trainer)
        kind, *operands = ask.operation
        steps, alone = [], False
        if kind in READS:
            answer = self._look(world, ask.operation)
            after = _with_trainer(world, rank, trainer._replace(answers=(*trainer.answers, answer)))
            stays = self.scene.once and ask.operation[1] not in {NUMBER, LEFT} and bool(answer)
            return [_step(trainer, ask.operation, after, rank)], stays
        if kind in {"set", "compare_set"}:
            after, answer = self._write(world, ask.operation)
            after = _with_trainer(after, rank, trainer._replace(answers=(*trainer.answers, answer)))
            steps = [_step(trainer, ask.operation, after, rank)]
        elif kind == "pause":
            if any(self._look(world, read) != answer for read, answer in ask.look):
                looked = trainer._replace(answers=(*trainer.answers, None))
                looked = self._shorter(rank, looked, trainer.answers[: ask.since])
                after = _with_trainer(world, rank, looked)
                steps = [_step(trainer, ask.operation, after, rank)]
        elif kind == "collective":
            steps, alone = self._collective(world, rank, trainer, *operands)
        else:
            steps = [_step(trainer, ask.operation, self._own(world, rank, trainer, ask), rank)]
            alone = True
            if kind not in {"announce", "end"}:
                return steps, alone
        if world.failures:
            steps += self._failures(world, rank, trainer, ask.operation)
        return steps, alone

    def _collective(
        self, world: World, rank: int, trainer: Trainer, index: int, payload: bytes
    ) -> tuple[list[Step], bool]:
        name = trainer.met
        assert name is not None
        group = dict(world.groups).get(name, Group((-1,) * self.scene.size))
        operation = ("collective", index, payload)
        if group.entered[rank] < index:
            group = group._replace(entered=_put(group.entered, rank, index))
            if payload:
                group = group._replace(sent=(*group.sent, (index, payload)))
            return [_step(trainer, operation, _with_group(world, name, group), rank)], True
        results: list[bytes | None] = []
        sent = dict(group.sent).get(index, b"")
        if min(group.entered) >= index:
            results.append(sent)
        if group.cut or any(
            each is None or not each.inside or each.met != name for each in world.trainers
        ):
            results.append(None)
        steps = []
        for result in results:
            after = trainer._replace(answers=(*trainer.answers, result))
            after_world = _with_trainer(world, rank, after)
            steps.append(_step(trainer, (*operation, result), after_world, rank))
        if (
            sent in results[:1]
            and sent
            and not payload
            and "flip" in self.scene.kinds
            and world.failures
        ):
            after = trainer._replace(answers=(*trainer.answers, b"\xff"))
            after_world = _with_trainer(world, rank, after)._replace(failures=world.failures - 1)
            steps.append(Step(f"    flip at {trainer.incarnation}", after_world, sure=False))
        return steps, False

    def _own(self, world: World, rank: int, trainer: Trainer, ask: Ask) -> World:
        """Return the world after an operation that commutes with what others do."""
        kind, *operands = ask.operation
        if kind == "end":
            (outcome,) = operands
            end = (outcome, trainer.held[0], trainer.lost)
            world = world._replace(ended=_put(world.ended, rank, end))
            return _without_past(_with_trainer(world, rank, None))
        after = trainer._replace(answers=(*trainer.answers, None))
        if kind == "announce":
            world = world._replace(boards=_put(world.boards, rank, operands[0]))
            if [read for read, _ in ask.look[-2:]] == [("get", LEFT), ("get", NUMBER)]:
                after = self._shorter(rank, after, (*trainer.answers[-2:], None))
        elif kind == "met":
            self._check_met(world, rank, trainer, (operands[0], operands[1]))
            after = after._replace(met=tuple(operands))
            world = world._replace(met=world.met | {tuple(operands)})
        elif kind == "open":
            after = after._replace(inside=True)
        elif kind == "close":
            after = after._replace(inside=False, met=None)
        elif kind == "hold":
            self._check_hold(world, trainer, *operands)
            after = after._replace(held=tuple(operands))
            if self.scene.slots:
                world = world._replace(slots=_put(world.slots, rank, after.held))
        elif kind == "again":
            held = tuple(operands)
            after = trainer._replace(start=held, held=held, answers=())
        else:
            raise AssertionError(kind)
        world = _with_trainer(world, rank, after)
        return _without_past(world) if kind == "announce" else world

    def _failures(
        self, world: World, rank: int, trainer: Trainer, operation: tuple[Any, ...]
    ) -> list[Step]:
        kinds, steps = self.scene.kinds, []
        fewer = world._replace(failures=world.failures - 1)
        for kind in ("dies", "for good", "late"):
            writes = operation[0] in {"set", "compare_set"}
            if kind in kinds and (kind != "late" or writes):
                after = fewer
                if kind == "late":
                    after = after._replace(late=world.late | {operation})
                if world.keepers[rank] is None:
                    keeper = Keeper(world.boards[rank], kind == "for good")
                    after = after._replace(keepers=_put(world.keepers, rank, keeper))
                after = _with_trainer(after, rank, None)
                steps.append(Step(f"    {kind}: {trainer.incarnation}", after, sure=False))
        if "drains" in kinds and not trainer.draining:
            after = _with_trainer(fewer, rank, trainer._replace(draining=True, answers=()))
            steps.append(Step(f"    drains: {trainer.incarnation}", after, sure=False))
        return steps

    def _of_keeper(self, world: World, rank: int) -> tuple[list[Step], bool]:
        keeper = world.keepers[rank]
        if keeper is None:
            return [], False
        operation = self._next(rank, keeper).operation
        kind, answer, after = operation[0], None, world
        label = f"keeper {rank}: {operation}"
        if kind == "end":
            end = ("for good", world.slots[rank][0], True)
            after = after._replace(
                ended=_put(world.ended, rank, end), keepers=_put(world.keepers, rank, None)
            )
            return [Step(label, after, self.scene.size + rank)], True
        if kind == "again":
            next_one = Keeper(world.boards[rank], for_good=False)
            dead = world.trainers[rank] is None and world.ended[rank] is None
            after = after._replace(keepers=_put(world.keepers, rank, next_one if dead else None))
            return [Step(label, after, self.scene.size + rank)], True
        if kind in READS:
            answer = self._look(world, operation)
        elif kind == "fork":
            forks = world.forks[rank] + 1
            held = world.slots[rank] if self.scene.slots else NOTHING
            after = after._replace(
                forks=_put(world.forks, rank, forks),
                trainers=_put(world.trainers, rank, Trainer(f"{rank}.{forks}", held, held, True)),
            )
        else:
            after, answer = self._write(world, operation)
        keeper = keeper._replace(answers=(*keeper.answers, answer))
        after = after._replace(keepers=_put(world.keepers, rank, keeper))
        return [Step(label, after, self.scene.size + rank)], kind == "fork"

    def _next(self, rank: int, actor: Trainer | Keeper) -> Ask:
        """Return the operation that an actor asks for now."""
        if isinstance(actor, Trainer):
            key = (rank, actor.incarnation, actor.start, actor.draining, actor.answers)
        else:
            key = (rank, actor)
        if key not in self._asked:
            desk = Desk(actor.answers)
            try:
                again = self._run(desk, rank, actor)
                desk.ask("again", *again)
            except Ask as ask:
                self._asked[key] = ask
        return self._asked[key]

    def _shorter(self, rank: int, trainer: Trainer, answers: Answers) -> Trainer:
        """Return the trainer with these answers only, which lead to the same place."""
        if self.scene.exact:
            return trainer
        short = trainer._replace(answers=answers)
        assert self._next(rank, short).operation == self._next(rank, trainer).operation
        return short

    def _run(self, desk: Desk, rank: int, actor: Trainer | Keeper) -> tuple[Any, ...]:
        rules = self.scene.rules
        if isinstance(actor, Trainer) and not actor.draining:
            mine = Process(rank, actor.incarnation, *actor.start)
            lost = Lost(reason="killed", reached=0, seconds=0.0) if actor.lost else None
            train(desk, self.scene, mine, lost)
            return mine.step, mine.data
        if isinstance(actor, Trainer):
            rules.leave(desk, rank=rank, reason="drained")
            desk.end("drained")
        if actor.for_good:
            rules.leave(desk, rank=rank, reason="failed for good")
            desk.end("for good")
        rules.heal(desk, rules, actor.failed)
        return ()

    def _values(self, world: World) -> dict[str, str]:
        if world.store not in self._stores:
            self._stores[world.store] = dict(world.store)
        return self._stores[world.store]

    def _look(self, world: World, operation: tuple[Any, ...]) -> str | bool | None:
        kind, operand = operation
        values = self._values(world)
        return values.get(operand) if kind == "get" else values.keys() >= set(operand)

    def _write(self, world: World, operation: tuple[Any, ...]) -> tuple[World, str | None]:
        """Return the world after a write, and what the writer is told, as torch's stores do."""
        kind, key, *operands = operation
        found = self._values(world).get(key)
        if kind == "compare_set" and (found or "") != operands[0]:
            return world, operands[0] if found is None else found
        value = operands[-1]
        if self.scene.once and found is not None and kind == "set":
            raise Violation(f"{key} is written twice: {found}, {value}")
        after = world._replace(store=(world.store - {(key, found)}) | {(key, value)})
        if key == NUMBER:
            # Who finishes closes its group like one that fails: a peer may count that once.
            finished = self._values(world).get(LEFT, "").count("finished")
            happened = self.scene.failures - world.failures + finished
            if int(value) != int(found or 0) + 1 or int(value) > happened:
                raise Violation(f"the number moves from {found} to {value}: {happened} failures")
        return after, value if kind == "compare_set" else None

    @staticmethod
    def _check_met(world: World, rank: int, trainer: Trainer, name: Name) -> None:
        generation, incarnations = name
        if incarnations[rank] != trainer.incarnation:
            raise Violation(f"{trainer.incarnation} is not in its own meeting: {name}")
        for other in world.met:
            if other[0] == generation and other != name:
                raise Violation(f"generation {generation} is split: {other[1]}, {incarnations}")

    @staticmethod
    def _check_hold(world: World, trainer: Trainer, step: int, data: bytes) -> None:
        if data != bytes([step] * CHUNKS):
            raise Violation(f"{trainer.incarnation} goes on from a torn state: {step}, {data!r}")
        best = max(each.held[0] for each in world.trainers if each is not None)
        if step < best:
            raise Violation(f"{trainer.incarnation} goes on from {step}, and somebody holds {best}")

    def _check_end(self, world: World) -> None:
        if None in world.ended:
            raise Violation(f"stuck: {world.trainers} {world.keepers}")
        outcomes = tuple(each[0] for each in world.ended if each is not None)
        self.ends.add(outcomes)
        if {"drained", "for good"} & set(outcomes):
            return
        for rank, each in enumerate(world.ended):
            # A trainer that is forked when peers have finished is told so, and has nothing to do.
            if (
                each is not None
                and each[1] < self.scene.last
                and not (each[0] == "told" and each[2])
            ):
                raise Violation(f"rank {rank} ends with {each}")


def _put(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _step(trainer: Trainer, operation: tuple[Any, ...], after: World, rank: int) -> Step:
    return Step(f"{trainer.incarnation}: {operation}", after, rank)


def _with_trainer(world: World, rank: int, trainer: Trainer | None) -> World:
    """Return the world with another trainer, and without groups in which nobody is any more."""
    trainers = _put(world.trainers, rank, trainer)
    inside = {each.met for each in trainers if each is not None and each.inside}
    groups = world.groups
    if any(name not in inside for name, _ in groups):
        groups = frozenset(each for each in groups if each[0] in inside)
    return world._replace(trainers=trainers, groups=groups)


def _without_past(world: World) -> World:
    """Return the world without what lies in generations that nobody will look at any more."""
    now = max((int(value) for key, value in world.store if key == NUMBER), default=0)
    trainers = zip(world.boards, world.trainers, strict=True)
    oldest = min([now, *(board for board, each in trainers if each is not None)])
    past = {
        (key, value)
        for key, value in world.store
        if key.startswith("g/") and int(key.split("/")[1]) < oldest
    }
    met = frozenset(each for each in world.met if each[0] >= oldest)
    return world._replace(store=world.store - past, met=met) if past else world


def _with_group(world: World, name: Name, group: Group) -> World:
    return world._replace(groups=frozenset({**dict(world.groups), name: group}.items()))
