"""Whether a keeper may kill its trainer: only one that others wait for, never one that waits.

Every keeper judges its own trainer, in this order. "Too long" is the limit of the section.

| the trainer is                                                       | verdict           |
|----------------------------------------------------------------------|-------------------|
| stopped (by a signal, or a debugger), without a beat for 5 s         | KILL              |
| in any section, without a beat for too long                          | KILL              |
| in a meeting                                                         | FINE: has limits  |
| in no collective, too long in its section                            | KILL              |
| behind a peer's reported collective, its own number still too long   | KILL              |
| in a collective, not too long                                        | FINE              |
| in a collective too long, where it was told to regroup too long ago  | KILL              |
| in a collective too long, the only rank                              | KILL              |
| in a collective too long, and all ranks report the same one          | REGROUP           |
| in a collective too long, otherwise                                  | REPORT its number |

Beats must come from a second thread of the trainer: the main one does not beat while it waits.
Collectives are counted anew in each generation of the group, and reports belong to one. A keeper
posts its trainer's number on REPORT and on REGROUP, and withdraws it when the number moves.

So one rank that is stuck is killed by its own keeper, while those of the others, who wait for it,
only report; and where nobody is behind (an answer was lost) all meet again. A peer that waits is no
reason to kill a rank that is slow within its own limit: an evaluation or a save may take longer
than a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from fmnist_dist.handover.board import Board, Section

FLOOR_SECONDS = 30.0  # no step's limit is below, unless configured
STEPS = 20  # a step may take so many times as long as steps do
UNMEASURED_SECONDS = 300.0  # before any step has been measured: the first one imports and compiles
STOPPED_SECONDS = 5.0  # a profiler that looks into a process stops it for far less
START_SECONDS = 300.0
RESTORE_SECONDS = 600.0  # reads and checks a checkpoint, from far away perhaps
EVALUATE_SECONDS = 600.0
SAVE_SECONDS = 600.0  # storage is tried again for as long as its own limits allow
FINISH_SECONDS = 600.0  # saves as well
LONGEST_LOOK_SECONDS = 2.0  # a look counts for no more: the keeper itself was stopped meanwhile

# Sections that have nothing to do with how long a step takes, and the least that each may take.
_SLOW = {
    Section.START: START_SECONDS,
    Section.RESTORE: RESTORE_SECONDS,
    Section.EVALUATE: EVALUATE_SECONDS,
    Section.SAVE: SAVE_SECONDS,
    Section.FINISH: FINISH_SECONDS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a keeper sees of its trainer."""

    section: Section
    section_seconds: float
    still_seconds: float  # since its collective number moved, or it left a slow section
    beat_age: float  # seconds
    collectives: int  # the number of the collective that it entered last
    stopped: bool  # by a signal or a debugger: state T or t in /proc/PID/stat

    @property
    def waiting_seconds(self) -> float:
        """How long it has been in its collective: one visit may hold several."""
        return min(self.section_seconds, self.still_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimit:
    """How long a trainer may be in one section."""

    configured: float | None  # --step-timeout, seconds
    step_seconds: float  # what steps take; 0: none has been measured

    def seconds(self, section: Section) -> float:
        if self.configured is not None:
            step = self.configured
        elif self.step_seconds > 0:
            step = max(FLOOR_SECONDS, STEPS * self.step_seconds)
        else:
            step = UNMEASURED_SECONDS
        return max(step, _SLOW.get(section, 0.0))


class Action(Enum):
    """What a keeper does with its trainer."""

    FINE = auto()  # nothing
    KILL = auto()  # SIGKILL, and fork another
    REPORT = auto()  # post its collective number for the other keepers
    REGROUP = auto()  # tell it to leave the group and to meet again


@dataclass(frozen=True, slots=True)
class Verdict:
    """An action, and the reason for it in words for the log."""

    action: Action
    reason: str = ""


_FINE = Verdict(Action.FINE)


def judge(
    reading: Reading,
    *,
    limit: StepLimit,
    peers: Mapping[int, int] | None,
    rank: int,
    world_size: int,
    told_seconds: float | None = None,
) -> Verdict:
    """Return what to do with the trainer of `rank`, by the table above.

    `peers` has the collective number that each rank's keeper has reported in this generation, None
    where that cannot be known; `told_seconds` is how long ago this trainer was told to regroup
    while in the collective where it is now, None if it was not.
    """
    seconds = limit.seconds(reading.section)
    others = {other: number for other, number in (peers or {}).items() if other != rank}
    lifeless = min(seconds, STOPPED_SECONDS) if reading.stopped else seconds
    if reading.beat_age > lifeless:
        return _kill("stopped" if reading.stopped else "no sign of life", reading.beat_age)
    if reading.section is Section.MEETING:
        return _FINE
    if reading.section is not Section.COLLECTIVE and reading.section_seconds > seconds:
        return _kill(f"stuck in {reading.section.name.lower()}", reading.section_seconds)
    ahead = max(others, key=lambda other: others[other], default=rank)
    if others.get(ahead, 0) > reading.collectives and reading.still_seconds > seconds:
        where = f"behind in collective {reading.collectives}"
        return _kill(f"{where}, rank {ahead} waits in {others[ahead]},", reading.still_seconds)
    if reading.section is not Section.COLLECTIVE or reading.waiting_seconds <= seconds:
        return _FINE
    overdue = told_seconds is not None and told_seconds > seconds
    return _judge_waiting(reading, others, world_size=world_size, overdue=overdue)


def _judge_waiting(
    reading: Reading, others: Mapping[int, int], *, world_size: int, overdue: bool
) -> Verdict:
    """Judge a trainer that waits in a collective for too long and is behind nobody."""
    number = f"collective {reading.collectives}"
    if overdue:
        return _kill(f"told to leave {number}, is there", reading.waiting_seconds)
    if world_size == 1:
        return _kill(f"stuck in {number}, alone,", reading.waiting_seconds)
    waits = f"waits in {number} for {reading.waiting_seconds:.0f} s"
    if len(others) == world_size - 1 and set(others.values()) == {reading.collectives}:
        return Verdict(Action.REGROUP, f"{waits}, and so do all")
    return Verdict(Action.REPORT, waits)


def _kill(what: str, seconds: float) -> Verdict:
    return Verdict(Action.KILL, f"{what} for {seconds:.0f} s")


class Stopwatch:
    """Counts for how long a value has stood, in seconds through which this process lived."""

    def __init__(self) -> None:
        self._value: object = None
        self._seconds = 0.0

    def seconds(self, value: object, passed: float) -> float:
        self._seconds = self._seconds + passed if value == self._value else 0.0
        self._value = value
        return self._seconds


class Watch:
    """A keeper's looks at one trainer. Make a new one for every trainer, look often.

    Times are counted by looks, not taken from the board: when a whole pod was frozen for an hour,
    its trainers have not been stuck for an hour.
    """

    def __init__(self, board: Board, *, now: float) -> None:
        self._board = board
        self._now = now
        self._section, self._beat, self._number = Stopwatch(), Stopwatch(), Stopwatch()

    def look(self, *, now: float, stopped: bool) -> Reading:
        """Return what the board says now (seconds of `time.monotonic`)."""
        passed = min(max(0.0, now - self._now), LONGEST_LOOK_SECONDS)
        self._now = now
        visit = self._board.visit()
        collectives = self._board.collectives
        moved = (collectives, visit if visit[0] in _SLOW else None)
        return Reading(
            section=visit[0],
            section_seconds=self._section.seconds(visit, passed),
            still_seconds=self._number.seconds(moved, passed),
            beat_age=self._beat.seconds(self._board.beaten, passed),
            collectives=collectives,
            stopped=stopped,
        )
