"""From the exit codes of workers to what the agent does next, and to its own exit code."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from fmnist_dist.errors import INTERRUPTED, ExitCode

# Another round would end in the same way.
FINAL = frozenset(
    {
        ExitCode.USAGE,
        ExitCode.DATA_DAMAGED,
        ExitCode.NO_PROGRESS,
        ExitCode.FENCED,
        ExitCode.INCOMPATIBLE,
    }
)
_SIGNALLED = 128  # as a shell has it: 128 + the number of the signal that ended a process

# What repeats itself comes before what may pass (a bug, a crash, a kill: 1), and that before what
# followed from the end of somebody else.
_WEIGHT: dict[int, int] = {
    **dict.fromkeys(FINAL, 0),
    ExitCode.TRANSIENT: 2,
    ExitCode.PEER_LOST: 3,
    ExitCode.DRAINED: 4,
    INTERRUPTED: 4,
    ExitCode.FINISHED: 5,
}

_FAULT = {
    ExitCode.FINISHED: "nobody",
    ExitCode.BUG: "a bug in the program",
    ExitCode.USAGE: "the command line",
    ExitCode.DATA_DAMAGED: "the stored data",
    ExitCode.NO_PROGRESS: "the settings or the program",
    ExitCode.TRANSIENT: "storage, network or rendezvous",
    ExitCode.FENCED: "another launch of the same run",
    ExitCode.INCOMPATIBLE: "the configuration",
    ExitCode.PEER_LOST: "another node",
    ExitCode.DRAINED: "whoever sent the signal",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one worker ended."""

    rank: int
    status: int  # as `subprocess` has it: below zero for a signal
    line: str = ""  # its last words

    @property
    def code(self) -> int:
        return self.status if self.status >= 0 else _SIGNALLED - self.status


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the agent ends, and why."""

    code: int
    reason: str
    worker: Ended | None = None  # whose end says most


class Next(Enum):
    FINISHED = "finished"
    FINAL = "final"  # the agent ends with the worker's code
    REJOIN = "rejoin"  # nobody's fault here: a new round, free of charge
    RESTART = "restart"  # a new round, as long as there is some restart left


def most_telling(workers: Sequence[Ended]) -> Ended:
    """Return the worker whose end says most about what went wrong; among equals the first one."""
    return min(workers, key=lambda ended: _WEIGHT.get(ended.code, 1))


def judge(workers: Sequence[Ended], *, in_doubt: bool = False) -> Next:
    """Return what follows from the end of all workers of a round.

    `in_doubt`: the agent was out of touch with the others, or has asked the workers to stop so that
    all meet again. They may have gone on without it, under another name: a worker that is fenced
    then joins them, and if it was another launch after all, the next round ends with 76 again.
    """
    worst = most_telling(workers)
    match worst.code:
        case ExitCode.FINISHED:
            return Next.FINISHED
        case ExitCode.FENCED if in_doubt:
            return Next.REJOIN
        case code if code in FINAL:
            return Next.FINAL
        case ExitCode.PEER_LOST | ExitCode.DRAINED:
            return Next.REJOIN
        case _:
            return Next.RESTART


def after_notice(workers: Sequence[Ended], *, in_doubt: bool = False) -> int:
    """Return the agent's exit code after it was asked to stop and all its workers have ended.

    0 where the run was finished, 143 where its state is saved; what says that it is not, is kept:
    a worker that ran into the end of its time was killed (137), or could not save (75).
    """
    code = most_telling(workers).code
    went_on = code == ExitCode.FENCED and in_doubt  # without it, see `judge`
    return ExitCode.DRAINED if code == ExitCode.PEER_LOST or went_on else code


def verdict(worst: Ended) -> ExitCode:
    """Return the agent's exit code after too many rounds without a newer step.

    Where the last one ended because storage or network are away, that may pass, whatever the count.
    """
    transient = worst.code == ExitCode.TRANSIENT
    return ExitCode.TRANSIENT if transient else ExitCode.NO_PROGRESS


def fault(code: int) -> str:
    """Return whose fault an exit code says it was, in words."""
    if code in _FAULT:
        return _FAULT[ExitCode(code)]
    if code == _SIGNALLED + signal.SIGKILL:
        return "out of memory, or the time to stop was over"
    return "whoever sent the signal" if code == INTERRUPTED else "a crash"


def reason(follows: Next, worst: Ended, *, again: bool) -> str:
    """Return why there is another round, in a word for the metrics."""
    if follows is Next.RESTART:
        return "worker_error"
    if again:
        return "membership"
    return "preempted" if worst.code == ExitCode.DRAINED else "collateral"
