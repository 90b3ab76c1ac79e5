"""What may happen in a small world of keepers and trainers, and what never may.

Any actor's next operation may come next, and while some are left any failure. To look again where
nothing has changed is not an operation: who waits for what nobody will bring is stuck. A failure is
nothing to count on: a world that needs one to go on is stuck too.

For size, unless `Scene.reduced` is off: where an actor's next operation commutes with all that
others may do, only it and the failures of that actor come next; and a look at the store forgets the
looks before it, as the loops of production code do. Nobody dies just before a read: what others see
is what they see of a death just after it.

Simplified: the members of a broken group know that at once.
"""

import re
from typing import Any

from every_state import Violation, visit
from generations import CHUNKS, NOTHING, READS, Answers, Ask, Desk, Held, Process, Scene, train
from worlds import (
    Group,
    Item,
    Keeper,
    Name,
    Operation,
    Trainer,
    World,
    answered,
    entered,
    fewer,
    put,
    with_group,
    with_trainer,
    without_past,
)

from fmnist_dist.distributed.generation import LEFT, NUMBER, Lost

WRITES = {"set", "compare_set", "add"}
STATES_MAX = 2_000_000  # of one scene

Events = list[tuple[str, World]]


def search(scene: Scene) -> "Laws":
    """Visit every state of a scene. Raises `Violation` with the way to the first bad one."""
    laws = Laws(scene)
    laws.states = visit(laws.first(), laws.following, states_max=STATES_MAX)
    return laws


class Laws:
    """What may happen in the worlds of one scene."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.states = 0
        self.ends: set[tuple[str, ...]] = set()  # outcomes that were seen, by rank
        self._asked: dict[Any, Ask] = {}
        self._stores: dict[frozenset[Item], dict[str, str]] = {}

    def first(self) -> World:
        size = self.scene.size
        held = self.scene.held or (NOTHING,) * size
        return World(
            trainers=tuple(Trainer(f"{rank}.1", each, each) for rank, each in enumerate(held)),
            keepers=(None,) * size,
            ended=(None,) * size,
            slots=held,
            boards=(0,) * size,
            forks=(1,) * size,
            failures=self.scene.failures,
        )

    def following(self, world: World) -> Events:
        """Return what may happen. Raises `Violation` where nothing may, and should."""
        events, failures = Events(), Events()
        for rank in range(self.scene.size):
            for found, failed, alone in (
                self._of_trainer(world, rank),
                self._of_keeper(world, rank),
            ):
                if alone and self.scene.reduced:
                    return found + failed
                events += found
                failures += failed
        for write in world.late:
            after = self.write(world, write)[0]._replace(late=world.late - {write})
            events.append((f"    arrives late: {write}", after))
        if not events:
            self._check_end(world)
        return events + failures + self._cuts(world)

    def _of_trainer(self, world: World, rank: int) -> tuple[Events, Events, bool]:
        """Return what a trainer may do, how it may fail, and whether all else can come later."""
        trainer = world.trainers[rank]
        if trainer is None:
            return [], [], False
        ask = self._next(rank, trainer)
        kind, *operands = ask.operation
        label = f"{trainer.incarnation}: {' '.join(str(each) for each in ask.operation)}"
        alone, mortal = False, kind not in READS
        if kind in READS:
            answer = self.look(world, ask.operation)
            events = [(label, answered(world, rank, trainer, answer))]
            alone = bool(answer) and self.scene.once and operands[0] not in {NUMBER, LEFT}
        elif kind in WRITES:
            after, answer = self.write(world, ask.operation)
            events = [(label, answered(after, rank, trainer, answer))]
        elif kind == "pause":
            changed = any(self.look(world, read) != answer for read, answer in ask.look)
            looked = trainer._replace(answers=(*trainer.answers, None))
            looked = self._shorter(rank, looked, trainer.answers[: ask.since])
            events = [(label, with_trainer(world, rank, looked))] if changed else []
        elif kind == "collective":
            events, flips, alone = self._collective(world, rank, trainer, ask.operation)
            return events, self._deaths(world, rank, trainer, ask.operation) + flips, alone
        else:
            events = [(label, self._own(world, rank, trainer, ask))]
            alone, mortal = True, kind in {"announce", "end"}
        deaths = self._deaths(world, rank, trainer, ask.operation) if mortal else []
        return events, deaths, alone

    def _collective(
        self, world: World, rank: int, trainer: Trainer, operation: Operation
    ) -> tuple[Events, Events, bool]:
        """Enter a collective, or leave it: it may fail once a member is gone, and else cannot."""
        name, (_, what, payload) = trainer.met, operation
        assert name is not None
        label = f"{trainer.incarnation}: collective {what}"
        group = dict(world.groups).get(name, Group((0,) * self.scene.size))
        if group.entered[rank] == trainer.done:
            group = entered(group, rank, what, payload)
            return [(f"{label} entered", with_group(world, name, group))], [], True
        everyone = min(group.entered) > trainer.done
        members = [each is not None and each.inside and each.met == name for each in world.trainers]
        sent = group.collectives[trainer.done][1]
        events, flips = Events(), Events()
        if everyone:
            after = trainer._replace(done=trainer.done + 1)
            events.append((label, answered(world, rank, after, sent)))
            if sent and not payload and "flip" in self.scene.kinds and world.failures:
                after_flip = answered(fewer(world), rank, after, b"\xff")
                flips.append((f"    a flipped bit; {label}", after_flip))
        if group.cut or not all(members):
            events.append((f"{label} fails", answered(world, rank, trainer, None)))
        return events, flips, False

    def _own(self, world: World, rank: int, trainer: Trainer, ask: Ask) -> World:
        """Return the world after an operation that takes nothing from what others may do."""
        kind, *operands = ask.operation
        after = trainer._replace(answers=(*trainer.answers, None))
        if kind == "announce":
            world = world._replace(boards=put(world.boards, rank, operands[0]))
            if [read for read, _ in ask.look[-2:]] == [("get", LEFT), ("get", NUMBER)]:
                after = self._shorter(rank, after, (*trainer.answers[-2:], None))
            return without_past(with_trainer(world, rank, after))
        if kind == "end":
            end = (*operands, trainer.held[0], trainer.lost)
            world = world._replace(ended=put(world.ended, rank, end))
            return without_past(with_trainer(world, rank, None))
        if kind == "met":
            name = (operands[0], operands[1])
            self._check_met(world, rank, trainer, name)
            world, after = world._replace(met=world.met | {name}), after._replace(met=name)
        elif kind == "open":
            after = after._replace(inside=True, done=0)
        elif kind == "close":
            after = after._replace(inside=False, met=None)
        elif kind == "hold":
            held = (operands[0], operands[1])
            self._check_hold(world, trainer, held)
            after = after._replace(held=held)
            if self.scene.slots:
                world = world._replace(slots=put(world.slots, rank, held))
        else:
            assert kind == "again"
            held = (operands[0], operands[1])
            after = trainer._replace(start=held, held=held, answers=())
        return with_trainer(world, rank, after)

    def _deaths(self, world: World, rank: int, trainer: Trainer, operation: Operation) -> Events:
        kinds, events = self.scene.kinds, Events()
        if not world.failures or rank not in self.scene.mortal:
            return events
        for kind in kinds & {"dies", "for good", "late"}:
            after = with_trainer(fewer(world), rank, None)
            if kind == "late":
                if operation[0] not in WRITES:
                    continue
                after = after._replace(late=world.late | {operation})
            if world.keepers[rank] is None:
                keeper = Keeper(world.boards[rank], kind == "for good")
                after = after._replace(keepers=put(world.keepers, rank, keeper))
            events.append((f"    {trainer.incarnation} {kind}", after))
        if "drains" in kinds and not trainer.draining:
            after = with_trainer(fewer(world), rank, trainer._replace(draining=True, answers=()))
            events.append((f"    {trainer.incarnation} drains", after))
        return events

    def _cuts(self, world: World) -> Events:
        """Break groups whose members live: a connection is lost, or a keeper has all regroup."""
        kinds, events = self.scene.kinds, Events()
        if not world.failures or not kinds & {"cut", "regroup"}:
            return events
        for name, group in world.groups:
            after = with_group(fewer(world), name, group._replace(cut=True))
            if "cut" in kinds and not group.cut:
                events.append((f"    cut: {name}", after))
            if "regroup" in kinds:
                before = "" if name[0] == 0 else str(name[0])
                move = ("compare_set", NUMBER, before, str(name[0] + 1))
                events.append((f"    regroup: {name}", self.write(after, move)[0]))
        return events

    def _of_keeper(self, world: World, rank: int) -> tuple[Events, Events, bool]:
        keeper = world.keepers[rank]
        if keeper is None:
            return [], [], False
        operation = self._next(rank, keeper).operation
        kind, answer, after, next_one = operation[0], None, world, None
        if kind in READS:
            answer = self.look(world, operation)
        elif kind in WRITES:
            after, answer = self.write(world, operation)
        elif kind == "fork":
            forks = world.forks[rank] + 1
            held = world.slots[rank] if self.scene.slots else NOTHING
            after = world._replace(forks=put(world.forks, rank, forks))
            after = with_trainer(after, rank, Trainer(f"{rank}.{forks}", held, held, lost=True))
        elif kind == "end":
            end = (operation[1], world.slots[rank][0], True)
            after = world._replace(ended=put(world.ended, rank, end))
        elif world.trainers[rank] is None and world.ended[rank] is None:
            next_one = Keeper(world.boards[rank], for_good=False)  # it died meanwhile
        if kind not in {"again", "end"}:
            next_one = keeper._replace(answers=(*keeper.answers, answer))
        after = after._replace(keepers=put(world.keepers, rank, next_one))
        label = f"keeper {rank}: {' '.join(str(each) for each in operation)}"
        return [(label, after)], [], kind in {"fork", "again", "end"}

    def _next(self, rank: int, actor: Trainer | Keeper) -> Ask:
        """Return the operation that an actor asks for now."""
        key: Any = (rank, actor)
        if isinstance(actor, Trainer):
            key = (rank, actor.incarnation, actor.start, actor.draining, actor.answers)
        if key not in self._asked:
            desk = Desk(actor.answers)
            try:
                desk.ask("again", *self._run(desk, rank, actor))
            except Ask as ask:
                self._asked[key] = ask
        return self._asked[key]

    def _run(self, desk: Desk, rank: int, actor: Trainer | Keeper) -> Held | tuple[()]:
        rules = self.scene.rules
        if isinstance(actor, Keeper):
            if actor.for_good:
                rules.leave(desk, rank=rank, reason="failed for good")
                desk.end("failed for good")
            rules.heal(desk, rules, actor.failed)
            return ()
        if actor.draining:
            rules.leave(desk, rank=rank, reason="drained")
            desk.end("drained")
        mine = Process(rank, actor.incarnation, *actor.start)
        lost = Lost(reason="killed", reached=0, seconds=0.0) if actor.lost else None
        train(desk, self.scene, mine, lost)
        return mine.step, mine.data

    def _shorter(self, rank: int, trainer: Trainer, answers: Answers) -> Trainer:
        """Return the trainer with these answers only, which lead to the same place."""
        if not self.scene.reduced:
            return trainer
        short = trainer._replace(answers=answers)
        assert self._next(rank, short).operation == self._next(rank, trainer).operation
        return short

    def _values(self, world: World) -> dict[str, str]:
        if world.store not in self._stores:
            self._stores[world.store] = dict(world.store)
        return self._stores[world.store]

    def look(self, world: World, operation: Operation) -> str | bool | None:
        kind, operand = operation
        values = self._values(world)
        return values.get(operand) if kind == "get" else values.keys() >= set(operand)

    def write(self, world: World, operation: Operation) -> tuple[World, str | None]:
        """Return the world after a write, and what the writer is told, as torch's stores do."""
        kind, key, *operands = operation
        found = self._values(world).get(key)
        value = str(int(found or 0) + 1) if kind == "add" else operands[-1]
        if kind == "compare_set" and (found or "") != operands[0]:
            return world, operands[0] if found is None else found
        if self.scene.once and found is not None and kind == "set":
            raise Violation(f"{key} is written twice: {found}, {value}")
        if key == NUMBER:
            self._check_number(world, int(found or 0), int(value))
        after = world._replace(store=(world.store - {(key, found)}) | {(key, value)})
        return after, None if kind == "set" else value

    def _check_number(self, world: World, before: int, after: int) -> None:
        """Who finishes closes its group like one that fails: a peer may count that once."""
        happened = self.scene.failures - world.failures
        happened += self._values(world).get(LEFT, "").count("finished")
        if after != before + 1 or after > happened:
            raise Violation(f"the number moves from {before} to {after}: {happened} failures")

    @staticmethod
    def _check_met(world: World, rank: int, trainer: Trainer, name: Name) -> None:
        number, incarnations = name
        if incarnations[rank] != trainer.incarnation:
            raise Violation(f"{trainer.incarnation} is not in its own meeting: {name}")
        for other, others in world.met:
            if other == number and others != incarnations:
                raise Violation(f"generation {number} is split: {others}, {incarnations}")

    @staticmethod
    def _check_hold(world: World, trainer: Trainer, held: Held) -> None:
        step, data = held
        if data != bytes([step] * CHUNKS):
            raise Violation(f"{trainer.incarnation} goes on from a torn state: {step}, {data!r}")
        best = max(each.held[0] for each in world.trainers if each is not None)
        if step < best:
            raise Violation(f"{trainer.incarnation} goes on from {step}, and somebody holds {best}")

    def _check_end(self, world: World) -> None:
        if None in world.ended:
            raise Violation(f"stuck: {world.trainers} {world.keepers}")
        ends = [each for each in world.ended if each is not None]
        outcomes = tuple(outcome for outcome, _, _ in ends)
        self.ends.add(outcomes)
        reasons = [*outcomes, self._values(world).get(LEFT, "")]
        if re.search("drained|failed for good", " ".join(reasons)):
            return
        for rank, (outcome, step, lost) in enumerate(ends):
            # Forked when peers had finished, it has nothing to do and nobody to take a state from.
            if step < self.scene.last and not (outcome == "told" and lost):
                raise Violation(f"rank {rank} ends at step {step}: {outcome}")
