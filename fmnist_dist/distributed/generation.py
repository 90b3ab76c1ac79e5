"""How the trainers of one launch meet again after one of them has died, without a restart.

All keys lie under the nonce of the keepers' roll call (`meeting`), so a launch begins with an empty
store, whatever dead attempts left elsewhere. A *generation* is one attempt at a process group.

1. The number of the generation that meets is one key; absent is 0. Who sees generation g fail moves
   it by compare-and-set from g to g + 1: once, however many see the failure, and never back.
2. A trainer reads the number, announces it in memory that it shares with its keeper, and only then
   arrives: one key per generation and rank says who it is and which state it holds. It leaves the
   meeting with all arrivals of that generation, or for a newer one as soon as the number moves.
3. Everything that is waited for in a generation (the peers' addresses, texts) is waited for with an
   eye on the number and on who has left for good. Keys of a generation carry its number.
4. The keeper of a dead trainer moves the number from the generation that was announced last, and
   only then forks the next trainer. Who does not come back, finished or not, says so: `leave`.

No generation is split: every process that leaves the meeting of g holds the same arrivals. For a
rank arrives in g twice only if two processes of it do. The first announced g or a later number
before it died (2), so the number was past g before the second was forked (4), and stays so (1).

- A slow keeper delays the next generation, which is not complete before its trainer is forked.
- A death between announcing and arriving moves a number that nobody needed to move: one round more.
- A death between arrival and group leaves peers with a dead one's arrival: they wait for an address
  that never comes, until the number moves.
- A write of the dead that lands late lands in a generation that is past; its move finds another
  number and does nothing.
- Whoever comes after a rank has left for good finds that said, and does not wait.

Deliberately absent: counters of arrivals (they cannot say who arrived, with what), deleted keys,
and time limits: `pause`, called between looks, sleeps and raises what the caller's limits demand.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

NUMBER = "generation"
LEFT = "left"  # JSON: why, by rank. One key, so that a look costs the same in a world of any size


class KeyValue(Protocol):
    """The part of a store that generations need."""

    def get(self, key: str) -> str | None:
        """Return the value, or None at once where there is none."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool:
        """Return at once whether all these keys are there."""

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        """Set `desired` where `expected` stands ("": nothing); return what stands there then."""


class GenerationMovedError(Exception):
    """The generation has failed: whoever is in it meets again."""


class PeersLeftError(Exception):
    """Ranks do not come back, so nobody waits for them: why, by rank."""

    def __init__(self, left: Mapping[int, str]) -> None:
        super().__init__("; ".join(f"rank {rank} has left: {left[rank]}" for rank in sorted(left)))
        self.left = dict(left)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """What became of a trainer's predecessor."""

    reason: str
    reached: int  # the last step that it had finished
    seconds: float  # since it died


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What a rank says of itself when it arrives."""

    rank: int
    incarnation: str  # a fresh nonce per trainer process
    step: int  # of the whole state that it holds; -1: it holds none
    digest: str  # SHA-256 of that state, hexadecimal; "" for none
    lost: Lost | None  # of a trainer that was forked again

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> "Arrival":
        fields = json.loads(text)
        lost = fields.pop("lost")
        return cls(**fields, lost=None if lost is None else Lost(**lost))


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Who came to a generation: all ranks, in their order."""

    generation: int
    arrivals: tuple[Arrival, ...]

    @property
    def source(self) -> int | None:
        """The rank whose state everyone takes: the highest step; None where nobody holds one."""
        best = max(self.arrivals, key=lambda each: (each.step, -each.rank))
        return best.rank if best.step >= 0 else None

    def behind(self) -> tuple[int, ...]:
        """Return the ranks that must receive the source's state."""
        if self.source is None:
            return ()
        step = self.arrivals[self.source].step
        return tuple(each.rank for each in self.arrivals if each.step < step)

    def conflicting(self) -> tuple[int, ...]:
        """Return the ranks whose state should be the source's, and is another."""
        if self.source is None:
            return ()
        source = self.arrivals[self.source]
        peers = [each for each in self.arrivals if each.step == source.step]
        return tuple(each.rank for each in peers if each.digest != source.digest)


def number(keys: KeyValue) -> int:
    """Return the number of the generation that meets now."""
    return int(keys.get(NUMBER) or 0)


def move(keys: KeyValue, *, failed: int) -> int:
    """End generation `failed`, unless somebody has; return the number as it is now."""
    now = keys.compare_set(NUMBER, str(failed) if failed else "", str(failed + 1))
    return int(now)


def leave(keys: KeyValue, *, rank: int, reason: str) -> None:
    """Say that this rank does not come back. What was said first stays."""
    text = keys.get(LEFT) or ""
    while rank not in (gone := _reasons(text)):
        text = keys.compare_set(LEFT, text, json.dumps({**gone, rank: reason}))


def left(keys: KeyValue) -> dict[int, str]:
    """Return the ranks that do not come back, and why."""
    return _reasons(keys.get(LEFT) or "")


def meet(
    keys: KeyValue,
    *,
    size: int,
    arrival: Arrival,
    announce: Callable[[int], None],
    pause: Callable[[], None],
) -> Meeting:
    """Arrive in the generation that meets, and in every newer one, until all have arrived in one.

    `announce` writes the number where the keeper still reads it when this process is dead. A caller
    that was in a generation before has moved the number from it. Raises `PeersLeftError`.
    """
    while True:
        gone = left(keys)
        if gone:
            raise PeersLeftError(gone)
        generation = number(keys)
        announce(generation)  # first: the keeper must know of an arrival that is cut off
        keys.set(_here(generation, arrival.rank), arrival.encode())
        everyone = [_here(generation, rank) for rank in range(size)]
        try:
            await_keys(keys, everyone, generation=generation, pause=pause)
        except GenerationMovedError:
            continue
        arrivals = tuple(Arrival.decode(_found(keys, key)) for key in everyone)
        return Meeting(generation=generation, arrivals=arrivals)


def await_keys(
    keys: KeyValue, names: Sequence[str], *, generation: int, pause: Callable[[], None]
) -> None:
    """Wait until all of these are there, in a generation that goes on.

    Raises `GenerationMovedError` once the generation has failed, even where all keys are there, and
    `PeersLeftError` where some are not, and a rank that may have owed them has left.
    """
    wanted = list(names)
    while True:
        complete = keys.check(wanted)
        now = number(keys)
        if now != generation:
            raise GenerationMovedError(f"generation {generation} has failed, {now} meets")
        if complete:
            return
        gone = left(keys)
        if gone and not keys.check(wanted):  # again: it may have come just before its rank left
            raise PeersLeftError(gone)
        pause()


def await_key(keys: KeyValue, key: str, *, generation: int, pause: Callable[[], None]) -> str:
    """Return a value once it is there, with the limits of `await_keys`."""
    await_keys(keys, [key], generation=generation, pause=pause)
    return _found(keys, key)


def has_arrived(keys: KeyValue, *, generation: int, rank: int) -> bool:
    """Whether a rank has come to this generation, or had before it died."""
    return keys.check([_here(generation, rank)])


def _here(generation: int, rank: int) -> str:
    return f"g/{generation}/here/{rank}"


def _reasons(text: str) -> dict[int, str]:
    return {int(rank): reason for rank, reason in json.loads(text or "{}").items()}


def _found(keys: KeyValue, key: str) -> str:
    value = keys.get(key)
    assert value is not None, f"{key} was there, and nobody deletes keys"
    return value
