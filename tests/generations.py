"""Keepers and trainers of a small world, around production code; `worlds` puts them together.

An actor is a function that is pure but for its `Desk`: run again with the answers that its
operations have got, it comes to the same place and asks for one more. That is its next operation,
so no threads are needed, and where an actor stands is a value: its arguments and these answers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fmnist_dist.distributed import generation, transfer
from fmnist_dist.distributed.generation import Arrival, Lost, Meeting

CHUNKS = 2  # in which a state is sent
READS = {"get", "check"}

Answers = tuple[Any, ...]
Held = tuple[int, bytes]  # step and state; the state of step s is `bytes([s] * CHUNKS)`
NOTHING: Held = (-1, b"")


class GroupError(Exception):
    """A collective has failed, as it does when a member is gone."""


class Ask(BaseException):
    """Ends the run of an actor whose next operation has no answer yet."""

    def __init__(self, operation: tuple[Any, ...], look: Answers, since: int) -> None:
        super().__init__(operation)
        self.operation = operation
        self.look = look  # reads and their answers since the last operation that was none
        self.since = since  # how many answers came before these


class Desk:
    """All that an actor can do, each thing with its given answer. A `generation.KeyValue`."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._look: list[Any] = []
        self._position = self._since = 0

    def ask(self, *operation: Any) -> Any:
        if self._position == len(self._answers):
            raise Ask(operation, tuple(self._look), self._since)
        answer = self._answers[self._position]
        self._position += 1
        if operation[0] in READS:
            self._look.append((operation, answer))
        else:
            self._look.clear()
            self._since = self._position
        return answer

    def get(self, key: str) -> str | None:
        answer: str | None = self.ask("get", key)
        return answer

    def check(self, keys: list[str]) -> bool:
        answer: bool = self.ask("check", tuple(keys))
        return answer

    def set(self, key: str, value: str) -> None:
        self.ask("set", key, value)

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        answer: str = self.ask("compare_set", key, expected, desired)
        return answer

    def add(self, key: str) -> int:
        """Count one up, as torch's stores can; only mistakes use it."""
        answer: int = self.ask("add", key)
        return answer

    def announce(self, number: int) -> None:
        self.ask("announce", number)

    def pause(self) -> None:
        self.ask("pause")

    def collective(self, name: str, payload: bytes = b"") -> bytes:
        result: bytes | None = self.ask("collective", name, payload)
        if result is None:
            raise GroupError
        return result

    def end(self, outcome: str) -> NoReturn:
        self.ask("end", outcome)
        raise AssertionError("the dead do not go on")


@dataclass
class Process:
    """What a trainer holds in its own memory."""

    rank: int
    incarnation: str
    step: int
    data: bytes

    def hold(self, desk: Desk, step: int, data: bytes) -> None:
        desk.ask("hold", step, data)
        self.step, self.data = step, data


def chunk(desk: Desk, mine: Process, source: Arrival, number: int) -> bytes:
    """Send or receive one chunk of the source's state."""
    sent = mine.data[number : number + 1] if mine.rank == source.rank else b""
    return desk.collective(f"chunk {number}", sent)


def receive(mine: Process, desk: Desk, meeting: Meeting) -> None:
    """Send or receive the source's state."""
    source = meeting.arrivals[meeting.source or 0]
    buffer = b"".join(chunk(desk, mine, source, number) for number in range(CHUNKS))
    if mine.rank in meeting.behind():
        mine.hold(desk, source.step, transfer.adopt(buffer, digest=source.digest))


def heal(desk: Desk, rules: "Rules", failed: int) -> None:
    """Do what a keeper does when its trainer has died."""
    rules.move(desk, failed=failed)
    desk.ask("fork")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The production code, each part of which a test may replace by a mistake."""

    meet: Callable[..., Meeting] = generation.meet
    move: Callable[..., object] = generation.move
    retreat: Callable[..., object] = generation.move  # a survivor's move
    await_keys: Callable[..., None] = generation.await_keys
    leave: Callable[..., None] = generation.leave
    receive: Callable[[Process, Desk, Meeting], None] = receive
    heal: Callable[[Desk, "Rules", int], None] = heal


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is searched through."""

    size: int
    failures: int
    kinds: frozenset[str] = frozenset({"dies"})  # of failures
    mortal: frozenset[int] = frozenset(range(9))  # ranks that may fail
    last: int = 2  # the step at which training ends
    held: tuple[Held, ...] = ()  # by rank, at the start; empty: nothing, as in a new run
    slots: bool = False  # whether a forked trainer finds its predecessor's state
    once: bool = True  # whether a key of a generation may not be written twice
    reduced: bool = True  # False: with every order of events that changes nothing for anybody
    rules: Rules = field(default_factory=Rules)


def train(desk: Desk, scene: Scene, mine: Process, lost: Lost | None) -> None:
    """Be a trainer for one generation. Returns when it has failed."""
    rules = scene.rules
    arrival = Arrival(
        rank=mine.rank,
        incarnation=mine.incarnation,
        step=mine.step,
        digest=transfer.digest_of(mine.data) if mine.step >= 0 else "",
        lost=lost,
    )
    try:
        meeting = rules.meet(
            desk, size=scene.size, arrival=arrival, announce=desk.announce, pause=desk.pause
        )
        desk.ask("met", meeting.generation, tuple(each.incarnation for each in meeting.arrivals))
        work(desk, scene, mine, meeting)
    except generation.PeersLeftError:
        desk.end("told")
    except (generation.GenerationMovedError, GroupError, transfer.TornStateError):
        desk.ask("close")
        rules.retreat(desk, failed=meeting.generation)
        return
    rules.leave(desk, rank=mine.rank, reason="finished")
    desk.end("finished")


def work(desk: Desk, scene: Scene, mine: Process, meeting: Meeting) -> None:
    """Build the group, hear the plan, share the state, train, and part."""
    number, rules = meeting.generation, scene.rules
    assert not meeting.conflicting()
    desk.ask("open")
    desk.set(f"g/{number}/address/{mine.rank}", mine.incarnation)
    addresses = [f"g/{number}/address/{rank}" for rank in range(scene.size)]
    rules.await_keys(desk, addresses, generation=number, pause=desk.pause)
    desk.collective("connect")
    if mine.rank == 0:
        desk.set(f"g/{number}/plan", "the plan")
    else:
        rules.await_keys(desk, [f"g/{number}/plan"], generation=number, pause=desk.pause)
    if meeting.source is None:
        mine.hold(desk, 0, bytes(CHUNKS))
    elif meeting.behind():
        rules.receive(mine, desk, meeting)
    while mine.step < scene.last:
        desk.collective(f"step {mine.step + 1}")
        mine.hold(desk, mine.step + 1, bytes(each + 1 for each in mine.data))
    desk.collective("farewell")  # so that nobody leaves a peer one step behind
