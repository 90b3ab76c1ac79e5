"""Tells trainers that crash again and again from trainers that somebody kills.

A trainer that is forked again goes on from the same state with the same bits: what it did by itself
it will do again. So after a few deaths of its own at one step a keeper gives up, and no restart can
help. A kill from outside says nothing about the next trainer, and is counted with more patience,
since the kernel's out-of-memory killer looks the same. Any progress clears all counts.

A checkpoint that kills whoever restores it is put into quarantine, and the one before is tried.
Where that happens again and again it is not the checkpoints: the next ones are left alone.
"""

import os
import signal
from collections import Counter
from dataclasses import dataclass

from fmnist_dist.errors import ExitCode
from fmnist_dist.handover.board import Section

SAME_STEP_DEATHS = 3  # of its own at one step, whatever kills lie between them: it gives up
ANY_DEATHS = 10  # in a row without progress: it gives up
RESTORE_DEATHS = 3  # while restoring one checkpoint: that goes into quarantine
QUARANTINES = 2  # without progress between them; a third one is not granted
# What a process gets for what it did itself; every other signal somebody else has sent.
_OWN_SIGNALS = {
    signal.SIGSEGV,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSYS,
    signal.SIGTRAP,
    signal.SIGPIPE,
}
_OUTSIDE_CODES = {ExitCode.TRANSIENT, ExitCode.PEER_LOST}  # somebody else did not answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """How a trainer ended, and where."""

    step: int  # finished steps; -1: none
    section: Section
    cause: str  # "killed by SIGKILL", "stuck in data for 31 s"
    own_fault: bool  # true as well of a trainer that the watchdog had to kill
    restoring: int | None  # the log index of the checkpoint that it was restoring


@dataclass(frozen=True, slots=True)
class Heal:
    """Fork another trainer."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Put this checkpoint into quarantine, then fork another trainer."""

    index: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No restart can help."""

    why: str


class Deaths:
    """The deaths of one keeper's trainers since they made progress."""

    def __init__(self) -> None:
        self._best: int | None = None
        self._quarantines: list[int] = []
        self._forget()

    def add(self, death: Death) -> Heal | Quarantine | GiveUp:
        """Count a death; return what follows from it."""
        if self._best is None or death.step > self._best:
            self._best = death.step
            self._quarantines.clear()
            self._forget()
        self._any += 1
        self._own[death.step] += death.own_fault
        if death.section is Section.RESTORE and death.restoring is not None:
            self._restoring[death.restoring] += 1
            if self._restoring[death.restoring] >= RESTORE_DEATHS:
                return self._quarantine(death.restoring, death)
        if self._own[death.step] >= SAME_STEP_DEATHS:
            return GiveUp(f"{self._own[death.step]} times {_at(death)}: {death.cause}")
        if self._any >= ANY_DEATHS:
            return GiveUp(
                f"{self._any} deaths without progress, the last {_at(death)}: {death.cause}"
            )
        return Heal()

    def _quarantine(self, index: int, death: Death) -> Quarantine | GiveUp:
        """Blame a checkpoint, unless too many have been blamed already."""
        if len(self._quarantines) >= QUARANTINES:
            tried = ", ".join(map(str, [*self._quarantines, index]))
            return GiveUp(f"restoring fails with each of the checkpoints {tried}: {death.cause}")
        self._quarantines.append(index)
        self._forget()
        return Quarantine(index)

    def _forget(self) -> None:
        self._any = 0
        self._own: Counter[int] = Counter()  # own-fault deaths by step
        self._restoring: Counter[int] = Counter()  # deaths by checkpoint


def cause_of(status: int) -> tuple[str, bool]:
    """Return how a process ended, by its wait status, and whether that was its own fault."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        dumped = " (core dumped)" if os.WCOREDUMP(status) else ""
        return f"killed by {_signal_name(-code)}{dumped}", -code in _OWN_SIGNALS
    named = f" ({ExitCode(code).name.lower()})" if code in set(ExitCode) else ""
    return f"exit code {code}{named}", code not in {ExitCode.FINISHED, *_OUTSIDE_CODES}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names of their own
        return f"signal {number}"


def _at(death: Death) -> str:
    after = "before the first step" if death.step < 0 else f"after step {death.step}"
    return f"{after} in {death.section.name.lower()}"
