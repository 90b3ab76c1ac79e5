"""Runs production code in every interleaving of its storage operations, by re-execution.

1. Actors are threads of which one runs at a time. Before each storage operation that can matter to
   another actor, the running one asks whether it goes on or who else does.
2. Every such question, and every fault, is a *choice*: a number below that of the options, 0 being
   nothing special. An execution is the list of its choices; the next one to run is that list with
   its last raisable number raised, until none is left.
3. What is explored is bounded by the number of preemptions and of faults in one execution: within
   these bounds it is complete (Musuvathi and Qadeer, PLDI 2007). Few suffice to find most races.

Left out, because it commutes with everything: a switch before a read of an existing log record,
which nobody changes or deletes (a test would find it if somebody did).
"""

import itertools
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from functools import cache

import pytest
from memory_storage import MemoryStorage

from fmnist_dist.checkpoint import log, record
from fmnist_dist.checkpoint.storage import AlreadyExistsError, StorageError

LIMIT_SECONDS = 60.0  # of one execution: only a bug of this file waits so long


class Violation(AssertionError):  # noqa: N818 - a finding
    """An invariant does not hold; the message tells every operation that led there."""


class Killed(BaseException):
    """Ends an actor: the process died, or the execution is over."""


@dataclass
class Choices:
    """The choices of one execution: the given ones first, then the first option of each."""

    prefix: list[int]
    made: list[tuple[int, int]] = field(default_factory=list)  # (choice, options)

    def choose(self, options: int) -> int:
        position = len(self.made)
        choice = self.prefix[position] if position < len(self.prefix) else 0
        assert choice < options, "an execution did not repeat itself"
        self.made.append((choice, options))
        return choice

    def following(self) -> list[int] | None:
        for position in range(len(self.made) - 1, -1, -1):
            choice, options = self.made[position]
            if choice + 1 < options:
                return [each for each, _ in self.made[:position]] + [choice + 1]
        return None


class Actor:
    """One process: runs `body` when the stage gives it the turn."""

    def __init__(self, stage: "Stage", name: str, body: Callable[[], None]) -> None:
        self.name = name
        self.turn = threading.Semaphore(0)
        self.error: Exception | None = None
        self.done = False
        self._stage = stage
        self._body = body
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        self.turn.acquire()
        try:
            if not self._stage.over:
                self._body()
        except Killed:
            pass
        except Exception as error:  # noqa: BLE001 - reported by `Stage.run`
            self.error = error
        self.done = True
        self._stage.leave(self)


class Stage:
    """One execution: the storage, the actors on it, and who has the turn."""

    def __init__(self, choices: Choices, *, preemptions: int, faults: int) -> None:
        self.storage = StagedStorage(self)
        self.history: list[str] = []
        self.over = False
        self.faults_left = faults
        self.options: tuple[str, ...] = ()  # what may happen to a `create`, besides nothing
        self._choices = choices
        self._preemptions_left = preemptions
        self._actors: list[Actor] = []
        self._current: Actor | None = None
        self._finished = threading.Semaphore(0)

    def actor(self, name: str, body: Callable[[], None]) -> None:
        self._actors.append(Actor(self, name, body))

    def run(self) -> None:
        """Run all actors to their ends. Raises what the first of them that failed raised."""
        for actor in self._actors:
            actor.thread.start()
        self._give(self._runnable()[self._choices.choose(len(self._runnable()))])
        ended = self._finished.acquire(timeout=LIMIT_SECONDS)
        assert ended, f"stuck after {self.history}"
        for actor in self._actors:
            actor.thread.join()
        self.storage.arrive_all()
        for actor in self._actors:
            if actor.error is not None:
                actor.error.add_note("\n".join(["the execution was:", *self.history]))
                raise actor.error

    def point(self, operation: str) -> None:
        """Let another actor run before the current one does `operation`, if that is chosen."""
        if self._current is None:
            return  # before or after the actors: set-up and last checks
        mine = self._current
        others = [each for each in self._runnable() if each is not mine]
        if others and self._preemptions_left:
            choice = self._choices.choose(1 + len(others))
            if choice:
                self._preemptions_left -= 1
                self._give(others[choice - 1])
                mine.turn.acquire()
                if self.over:
                    raise Killed
        self.history.append(f"{mine.name}: {operation}")

    def fault(self) -> str | None:
        """Return what happens to the current operation, None for nothing special."""
        if self._current is None or not self.options or not self.faults_left:
            return None
        choice = self._choices.choose(1 + len(self.options))
        if not choice:
            return None
        self.faults_left -= 1
        self.history.append(f"    {self.options[choice - 1]}")
        return self.options[choice - 1]

    def happens(self) -> bool:
        """Return whether something happens that may as well happen later."""
        return self._choices.choose(2) == 1

    def leave(self, actor: Actor) -> None:
        runnable = self._runnable()
        self.over = self.over or actor.error is not None
        if runnable:
            index = 0 if self.over else self._choices.choose(len(runnable))
            self._give(runnable[index])
        else:
            self._current = None
            self._finished.release()

    def _runnable(self) -> list[Actor]:
        return [each for each in self._actors if not each.done]

    def _give(self, actor: Actor) -> None:
        self._current = actor
        actor.turn.release()


class StagedStorage(MemoryStorage):
    """Memory with a question before every operation, and faults as networks have them.

    `applied` and `lost`: the create happens, and the caller sees an error or "exists"; `refused`:
    it does not happen; `late`: it happens later, if the path is still free; `killed`: the process
    dies instead. A folder is deleted object by object, as every real storage does it.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage
        self._late: list[tuple[str, bytes]] = []
        self.created: Callable[[str], None] = lambda _: None
        self.deleted: Callable[[str], None] = lambda _: None

    def create(self, path: str, data: bytes) -> None:
        self._stage.point(f"create {path}")
        self._arrivals()
        fault = self._stage.fault()
        if fault == "killed":
            raise Killed
        if fault == "refused":
            raise StorageError("refused")
        if fault == "late":
            self._late.append((path, data))
            raise StorageError("no answer")
        super().create(path, data)
        self.created(path)
        if fault == "applied":
            raise StorageError("no answer")
        if fault == "lost":
            raise AlreadyExistsError(path)

    def read(self, path: str) -> bytes:
        if not (path.startswith("log/") and path in self.objects):
            self._stage.point(f"read {path}")
            self._arrivals()
        return super().read(path)

    def list(self, folder: str) -> list[str]:
        self._stage.point(f"list {folder}")
        self._arrivals()
        return super().list(folder)

    def delete(self, *paths: str) -> None:
        for path in paths:
            self._stage.point(f"delete {path}")
            existed = path in self.objects
            super().delete(path)
            if existed:
                self.deleted(path)

    def delete_folder(self, folder: str) -> None:
        for name in self.list(folder):
            self.delete(f"{folder}/{name}")

    def arrive_all(self) -> None:
        while self._late:
            self._apply_late()

    def _arrivals(self) -> None:
        while self._late and self._stage.happens():
            self._apply_late()

    def _apply_late(self) -> None:
        path, data = self._late.pop(0)
        if path not in self.objects:
            super().create(path, data)
            self._stage.history.append(f"    arrives late: {path}")
            self.created(path)


class _Clock:
    @staticmethod
    def now(zone: tzinfo) -> datetime:
        return datetime(2026, 1, 1, tzinfo=zone)


def explore(
    scene: Callable[[Stage], Callable[[], None] | None],
    *,
    preemptions: int = 0,
    faults: int = 0,
    executions_max: int = 20_000,
) -> int:
    """Run a scene in every way within the bounds; return in how many.

    `scene` puts actors on a stage, and may return a check of what they have left behind.
    Raises whatever an actor or a check raises, with the execution in its notes.
    """
    prefix: list[int] | None = []
    executions = 0
    with pytest.MonkeyPatch.context() as patch:
        # Equal records in all executions, so that each is parsed once: half of the time goes there.
        patch.setattr(record, "datetime", _Clock)
        patch.setattr(log, "decode", cache(record.decode))
        while prefix is not None:
            numbers = itertools.count(1)
            patch.setattr(secrets, "token_hex", lambda _, n=numbers: f"{next(n):016x}")
            choices = Choices(prefix)
            stage = Stage(choices, preemptions=preemptions, faults=faults)
            check = scene(stage)
            stage.run()
            executions += 1
            try:
                if check is not None:
                    check()
            except Exception as error:
                error.add_note("\n".join(["the execution was:", *stage.history]))
                raise
            assert executions <= executions_max, f"more than {executions_max} executions"
            prefix = choices.following()
    return executions
