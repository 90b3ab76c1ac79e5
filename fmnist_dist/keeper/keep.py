"""The keeper: what torchrun starts. It loads all that is slow, forks the trainer, and again.

A trainer that dies is replaced in place: its peers meet its successor in the next generation, and
no step is lost. What cannot be healed so ends with an exit code, and the launcher takes over.
"""

import contextlib
import faulthandler
import gc
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from functools import partial

from fmnist_dist import limits
from fmnist_dist.desk import Desk, Prepared
from fmnist_dist.distributed import generation
from fmnist_dist.distributed.connection import StoreLostError
from fmnist_dist.distributed.generation import Lost
from fmnist_dist.distributed.process import stat_fields
from fmnist_dist.distributed.roster import StoreKeys
from fmnist_dist.distributed.stop import SIGNALS, handled, handled_to_the_end, woken_by_signals
from fmnist_dist.errors import INTERRUPTED, ExitCode, TransientError
from fmnist_dist.handover.board import Board, Section
from fmnist_dist.handover.slots import Slots
from fmnist_dist.held import rehearse
from fmnist_dist.keeper.deaths import Death, Deaths, GiveUp, Quarantine, cause_of
from fmnist_dist.keeper.fork import NoRoomError, fork
from fmnist_dist.keeper.peers import Peers
from fmnist_dist.keeper.rescue import rescue
from fmnist_dist.keeper.spare import Spare
from fmnist_dist.keeper.watchdog import Action, StepLimit, Verdict, Watch, judge
from fmnist_dist.opening import noting_failures
from fmnist_dist.telemetry.events import EventLog
from fmnist_dist.telemetry.phases import Phases

STACKS_SIGNAL = signal.SIGUSR2  # a trainer prints the stacks of its threads
_STDERR = 2  # the descriptor: whatever `sys.stderr` has become
# A trainer that ends so has said why; another one would end in the same way, or has nothing to do.
_SAID = {int(code) for code in ExitCode} - {int(ExitCode.BUG)} | {INTERRUPTED}

# There a trainer waits for its peers.
_WAITS = {Section.MEETING, Section.COLLECTIVE, Section.RESTORE, Section.EVALUATE}

_events = EventLog("fmnist_dist.keeper")


def keep(prepared: Prepared, train: Callable[[Desk], int], phases: Phases) -> int:
    """Have trainers train, one after the other, until the run's end; return the exit code."""
    with (
        woken_by_signals() as pipe,
        handled({signal.SIGCHLD}, _wake),
        handled_to_the_end(_wake),
    ):
        keeper = Keeper(prepared, train, pipe)
        with noting_failures(prepared.place, keeper.board):
            return keeper.run(phases)


class Keeper:
    """One rank's keeper."""

    def __init__(
        self, prepared: Prepared, train: Callable[[Desk], int], pipe: tuple[int, int]
    ) -> None:
        self._prepared = prepared
        self._train = train
        self._pipe = pipe
        self._rank = prepared.roster.rank
        self._config = prepared.launch.config
        self._keys = StoreKeys(prepared.roster.connect())
        self.board = Board.create()
        self._slots = Slots.create()
        self._deaths = Deaths()
        self._interrupts = 0
        self._killed_for: str | None = None  # why this keeper has killed its trainer
        self._dead_by = float("inf")  # when that one must have died
        self._has_said_lost = False  # that the store is
        self._told_at: float | None = None  # when this trainer was told to regroup, and where
        self._told_in = (0, 0)
        self._reported: str | None = None  # the key under which a report stands
        self._suspect: int | None = None
        self._spare: Spare | None = None
        self._peers = Peers(self._keys, rank=self._rank, size=prepared.roster.size)
        self._forked_at = -1  # the step at which this trainer began

    def run(self, phases: Phases) -> int:
        gc.collect()
        gc.freeze()  # what a collection does not touch stays shared with the trainers
        desk = Desk(board=self.board, slots=self._slots, phases=phases)
        self._begin()
        trainer = self._fork(desk)
        while True:
            status = self._watch(trainer)
            died_at = time.monotonic()
            try:
                if status is None:
                    code = self._abandon()
                elif (ends_with := self._end(status)) is not None:
                    code = ends_with
                else:
                    trainer = self._heal(status, died_at)
                    continue
            except (TransientError, OSError) as error:  # no store, no room for a process
                _events.error("worker lost, and no new one can start", why=str(error))
                code = self._give_up(ExitCode.TRANSIENT)
            self._say_left(code)
            return code

    def _heal(self, status: int, died_at: float) -> int:
        """Return the process that trains in a dead one's place."""
        reason = self._killed_for or cause_of(status)[0]
        # Before the fork: nobody may meet the successor where the dead one had arrived.
        generation.move(self._keys, failed=self.board.generation)
        trainer = self._replace(Lost(reason=reason, reached=self.board.step, seconds=0.0), died_at)
        _events.warning("worker lost, a new one takes its place", why=reason)
        return trainer

    def _abandon(self) -> int:
        """Leave a trainer that does not die to the kernel; return the exit code."""
        _events.error(
            "worker was killed and does not die: the kernel keeps it, perhaps for a dead disk",
            why=self._killed_for,
            seconds=limits.DEATH_SECONDS,
        )
        return self._give_up(ExitCode.TRANSIENT)

    def _give_up(self, code: int) -> int:
        """Save what is left; return the exit code: `code`, unless another has the run."""
        try:
            saved = self._rescue("survivor", limits.RESCUE_SECONDS)
        except NoRoomError as error:  # checkpoints stay as they are
            _events.error("could not save from the keeper's memory", why=str(error))
            return code
        return ExitCode.FENCED if saved == ExitCode.FENCED else code

    def _rescue(self, reason: str, seconds: float) -> int:
        return rescue(self._prepared, self.board, self._slots, reason=reason, seconds=seconds)

    def _replace(self, lost: Lost, died_at: float) -> int:
        """Return the process that takes a dead trainer's place: the spare, or a new fork."""
        spare, self._spare = self._spare, None
        self._begin()
        if spare is not None and spare.call(lost, died_at=died_at):
            return spare.process
        return self._fork(self._desk(lost, died_at))

    def _fork(self, desk: Desk) -> int:
        return fork(partial(self._be_trainer, desk), name="fmnist-trainer", close=self._pipe)

    def _begin(self) -> None:
        self.board.renew()
        self._killed_for = self._told_at = None
        self._forked_at = self.board.step

    def _desk(self, lost: Lost, died_at: float) -> Desk:
        return Desk(
            board=self.board,
            slots=self._slots,
            lost=lost,
            died_at=died_at,
            suspect=self._suspect,
        )

    def _rehearse(self, is_called: Callable[[], bool]) -> Callable[[Lost, float], int]:
        """Prepare, in a spare, what every trainer needs; return how it becomes one."""
        rehearsed = rehearse(self._prepared, self.board, is_called=is_called)

        def be_trainer(lost: Lost, died_at: float) -> int:
            desk = self._desk(lost, died_at)
            desk.rehearsed = rehearsed
            return self._be_trainer(desk)

        return be_trainer

    def _be_trainer(self, desk: Desk) -> int:
        faulthandler.register(STACKS_SIGNAL, file=_STDERR, all_threads=True)
        return self._train(desk)

    def _watch(self, trainer: int) -> int | None:
        """Return the wait status of the trainer, when it has ended; None if no kill can end it."""
        watch = Watch(self.board, now=time.monotonic())
        if self.board.draining:
            os.kill(trainer, signal.SIGTERM)
        while True:
            select.select([self._pipe[0]], [], [], limits.KEEPER_SECONDS)
            self._hear(trainer)
            done, status = os.waitpid(trainer, os.WNOHANG)
            if done:
                return status
            if self._killed_for is None:
                try:
                    self._look(trainer, watch)
                    self._look_around()
                except StoreLostError as error:
                    self._say_store_lost(error)
            elif time.monotonic() > self._dead_by:
                return None
            if self._spare is None and self.board.step > self._forked_at:
                self._prepare_spare()
            if self.board.draining and time.monotonic() > self._kill_at():
                self._kill(trainer, "it did not stop in time")

    def _prepare_spare(self) -> None:
        try:
            self._spare = Spare(self._rehearse, close=self._pipe)
        except (NoRoomError, OSError) as error:  # this trainer goes on without
            self._forked_at = sys.maxsize
            _events.warning("no room for a spare worker", why=str(error))

    def _hear(self, trainer: int) -> None:
        """Pass a wish to stop on to the trainer: nobody else does."""
        try:
            numbers = os.read(self._pipe[0], 256)
        except BlockingIOError:
            return
        for number in numbers:
            self._interrupts += number == signal.SIGINT
            if number not in SIGNALS or self.board.draining:
                continue
            self.board.drain_deadline = time.monotonic() + self._config.drain_seconds
            self.board.draining = True
            os.kill(trainer, signal.SIGTERM)
            self._say_heard(signal.Signals(number))
        if self._interrupts > 1:
            self._kill(trainer, "interrupted twice")

    def _say_heard(self, number: signal.Signals) -> None:
        """Answer at once: the step at hand may be long, and a worker that is stuck says nothing."""
        again = "; a second one stops at once" if number == signal.SIGINT else ""
        _events.info(
            f"{number.name}: saving, then stopping{again}", limit_seconds=self._config.drain_seconds
        )

    def _kill_at(self) -> float:
        """Return when a drain ends: what is left then is for saving in the trainer's place."""
        reserve = limits.kill_reserve_seconds(self._config.drain_seconds)
        return self.board.drain_deadline - reserve

    def _look(self, trainer: int, watch: Watch) -> None:
        reading = watch.look(now=time.monotonic(), stopped=_is_stopped(trainer))
        limit = StepLimit(
            configured=self._config.step_timeout, step_seconds=self.board.step_seconds
        )
        now_in = (self.board.generation, reading.collectives)
        if self._told_in != now_in:
            self._told_at = None
        told = None if self._told_at is None else time.monotonic() - self._told_at

        def verdict(peers: dict[int, int] | None) -> Verdict:
            return judge(
                reading,
                limit=limit,
                peers=peers,
                rank=self._rank,
                world_size=self._prepared.roster.size,
                told_seconds=told,
            )

        found = verdict(None)
        if found.action is Action.REPORT:
            self._report(str(reading.collectives))
        elif self._reported is not None:
            self._report("")
        if reading.still_seconds > limit.seconds(reading.section):
            found = verdict(self._reports())
        match found.action:
            case Action.KILL:
                self._print_stacks(trainer, found.reason)
                self._kill(trainer, found.reason)
            case Action.REGROUP if self._told_at is None:
                _events.warning("nobody is behind: all meet again", why=found.reason)
                self._told_at, self._told_in = time.monotonic(), now_in
                generation.move(self._keys, failed=self.board.generation)
            case _:
                pass

    def _look_around(self) -> None:
        """Count for the others; where this rank waits for them, see whether their hosts live."""
        now = time.monotonic()
        self._peers.count(now)
        section, seconds = self.board.where()
        if section not in _WAITS or seconds < limits.ALIVE_SECONDS:
            return
        for rank in self._peers.silent(now):
            if rank not in generation.left(self._keys):
                why = f"no word of its host for {limits.SILENT_SECONDS:g} s"
                _events.warning("a worker's host is lost", of_rank=rank, why=why)
                generation.leave(self._keys, rank=rank, reason=why)
                generation.move(self._keys, failed=self.board.generation)

    def _report(self, number: str) -> None:
        """Tell the other keepers in which collective this trainer waits; "": in none any more."""
        key = self._reported or f"stuck/{self.board.generation}/{self._rank}"
        self._keys.set(key, number)
        self._reported = key if number else None

    def _reports(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for rank in range(self._prepared.roster.size):
            text = self._keys.get(f"stuck/{self.board.generation}/{rank}")
            if text:
                found[rank] = int(text)
        return found

    def _print_stacks(self, trainer: int, reason: str) -> None:
        """Have all threads of the trainer print their stacks; a stopped one goes on for that."""
        _events.error("worker stuck: the stacks of its threads follow", why=reason)
        os.kill(trainer, STACKS_SIGNAL)
        os.kill(trainer, signal.SIGCONT)
        time.sleep(limits.STACKS_SECONDS)

    def _kill(self, trainer: int, why: str) -> None:
        if self._killed_for is None:
            self._killed_for = why
            self._dead_by = time.monotonic() + limits.DEATH_SECONDS
            os.kill(trainer, signal.SIGKILL)

    def _end(self, status: int) -> int | None:
        """Return the exit code to end with, or None: another trainer is to go on."""
        if os.WIFEXITED(status) and (code := os.WEXITSTATUS(status)) in _SAID:
            return code
        if self.board.finished:
            return ExitCode.FINISHED
        if self._interrupts > 1:
            if self._rank == 0:
                said = "interrupted: steps since the newest checkpoint are lost"
                _events.error(said, exit_code=INTERRUPTED)
            return INTERRUPTED
        if self.board.draining:
            left = max(limits.KILL_SECONDS, self.board.drain_deadline - time.monotonic())
            code = ExitCode.FINISHED if self.board.step <= 0 else self._rescue("drain", left)
            return ExitCode.DRAINED if code == ExitCode.FINISHED else code
        return self._consider(status)

    def _consider(self, status: int) -> int | None:
        """Tell a crash loop from a kill, and a checkpoint that crashes whoever restores it."""
        cause, own_fault = cause_of(status)
        section, _ = self.board.where()
        death = Death(
            step=self.board.step,
            section=section,
            cause=self._killed_for or self.board.error or cause,
            own_fault=own_fault or self._killed_for is not None,
            restoring=self.board.restoring if self.board.restoring >= 0 else None,
        )
        match self._deaths.add(death):
            case GiveUp(why):
                code = self._give_up(ExitCode.NO_PROGRESS)
                _events.error(
                    f"no progress: {why}; a restart would end in the same way, see the lines above",
                    exit_code=code,
                )
                return code
            case Quarantine(index):
                self._suspect = index
                self._keys.set("suspect", str(index))  # it is rank 0 that chooses
                self._slots.clear()
            case _:
                pass
        return None

    def _say_store_lost(self, error: StoreLostError) -> None:
        """Tell it once. The trainer finds it out when it needs its peers, saves, and ends."""
        if not self._has_said_lost:
            _events.warning("no lost worker can be replaced any more", why=str(error))
            self._has_said_lost = True

    def _say_left(self, code: int) -> None:
        with contextlib.suppress(StoreLostError):  # nobody is left to be told
            generation.leave(self._keys, rank=self._rank, reason=f"exit code {code}")


def _wake(_number: int, _frame: object) -> None:
    """Let the interpreter write the signal's number into the pipe, and go on."""


def _is_stopped(process: int) -> bool:
    try:
        return stat_fields(process)[0] in {"T", "t"}
    except OSError:  # it has ended meanwhile
        return False
