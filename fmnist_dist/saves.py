"""When to save, who saves, and what becomes of a save that fails.

Rank 0 saves when a checkpoint is due: the step pays for one copy (`staging`), a thread does the
rest. One save is under way at a time. What is due meanwhile is remembered, not copied: as soon as
the thread is free the state of that moment is saved, the newest one, so no second copy ever waits.

Any rank may save at the end (drain, lost peers), on the thread that asks for it: all hold the same
state, and the log admits a step once. Any thread may ask for it.
"""

import threading
import time
from collections.abc import Callable
from functools import partial

from fmnist_dist import limits
from fmnist_dist.checkpoint.deadline import within
from fmnist_dist.checkpoint.folder import describe
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.checkpoint.watch import UNWATCHED, AbandonedError, Watch
from fmnist_dist.checkpoint.writer import RunWriter, Snapshot
from fmnist_dist.committer import Committer
from fmnist_dist.config import AUTO, Config
from fmnist_dist.distributed.comparison import Comparison
from fmnist_dist.distributed.connection import StoreLostError
from fmnist_dist.distributed.share import DifferentStatesError
from fmnist_dist.due import Due
from fmnist_dist.errors import FencedError, NoProgressError, TransientError
from fmnist_dist.flight import Copy, Flight, digest_of
from fmnist_dist.handover.board import Board
from fmnist_dist.pace import Pace
from fmnist_dist.plan import Plan
from fmnist_dist.saver import Saver
from fmnist_dist.staging import Staging
from fmnist_dist.state import Durable, TrainState
from fmnist_dist.telemetry.events import EventLog
from fmnist_dist.telemetry.progress import Progress

_SHARE_FOR_FLIGHT = 0.75  # of a limit: for a save of the very state that is under way already

_events = EventLog("fmnist_dist.saves")


class Saves:
    """Saves the state, and keeps training alive while storage is away.

    `write`, `retires` and `save` are the `Committer`'s. `precede` is how many living ranks are to
    try before this one, so that one writes and all see. The board tells a trainer's successor of a
    save that has died with it: that one starts again at once.
    """

    def __init__(
        self,
        write: Callable[[], RunWriter],
        log: RunLog,
        config: Config,
        plan: Plan,
        progress: Progress,
        board: Board,
        *,
        retires: bool,
        save: Callable[[RunWriter, Snapshot, Watch], bool] = RunWriter.save,
    ) -> None:
        self._plan = plan
        self._board = board
        self._committer = Committer(write, log, config, progress, board, retires=retires, save=save)
        is_paced = config.save_every_steps == AUTO and retires
        self._pace = Pace(log) if is_paced else None
        self._due = Due(
            config,
            at_once=board.saving > 0,
            paced=self._pace.is_due if self._pace is not None else lambda _: False,
        )
        self._saver = Saver()
        self._flight: Flight | None = None  # what the thread saves
        self._staging: Staging | None = None  # its copy, and nobody else's while it is busy
        self._staged = threading.Lock()  # held by whoever fills that, or saves beside the thread
        self.differs = False  # the ranks' copies; see `loop`
        self.shown = digest_of({}, step=0), 0  # the digest of this rank's copy, and its step
        self.precede = 0

    @property
    def writer(self) -> RunWriter:
        """This rank's writer. Raises `FencedError`, `StorageError`."""
        return self._committer.writer

    @property
    def newest(self) -> Durable | None:
        """What is durable, as rank 0 tells the others with every step."""
        return self._committer.newest

    def prepare(self, state: TrainState) -> None:
        """Make the memory for copies ahead: the first save is to cost no more than a later one.

        Then read what decides how often to save, if that is left to the program.
        """
        if self._saver.busy or state.step == 0:
            return
        if self._staging is not None:
            if self._pace is not None and not self._pace.is_read and self._flight is None:
                self._saver.start(self._pace.read)
        elif self._staged.acquire(blocking=False):
            try:
                with state.still():
                    self._staging = Staging(state.tensors_by_file())
                self._saver.start(self._staging.touch)
            finally:
                self._staged.release()

    def wants(self, step: int, *, ends_epoch: bool) -> bool:
        """Whether the state should be saved after `step` steps: it is due, and the thread is free.

        What is due and cannot be, is wanted after every step from then on. Raises what went wrong
        with the last save: `FencedError`, `StorageError` after the limit only.
        """
        self._collect()
        if self._pace is not None:
            self._pace.stepping(beside_save=self._flight is not None)
        reason = self._due.reason(step, ends_epoch=ends_epoch)
        if reason is not None and self._saver.busy:
            self._due.remember(reason)
            return False
        return reason is not None

    def offer(
        self, state: TrainState, *, ends_epoch: bool, comparison: Comparison | None = None
    ) -> None:
        """Copy the state if a save is due, and let the thread save it; raises as `wants` does.

        Given a `comparison`, all ranks copy it now, and it is committed if all hold the same.
        """
        self._collect()
        reason = self._due.reason(state.step, ends_epoch=ends_epoch)
        if reason is None or self.is_durable(state):
            return
        if self._saver.busy or not self._staged.acquire(blocking=False):
            self._due.remember(reason)
            return
        began = time.monotonic()
        try:
            self._board.saving = state.step
            copy = self._copy(state, reason)
            self._flight = Flight(state.step, comparison)
            self._flight.pause_seconds = time.monotonic() - began
            if self._pace is not None:
                self._pace.leave_out()
            self._due.copied()
            # Last: a thread that was woken takes Python's lock from this one.
            self._saver.start(partial(self._fly, copy, self._flight))
        finally:
            self._staged.release()

    def show(self, state: TrainState, comparison: Comparison) -> None:
        """Copy the state, and let the thread tell rank 0, which saves it, what it is."""
        self._collect()
        if self._saver.busy or not self._staged.acquire(blocking=False):
            return
        try:
            copy = self._copy(state, "")
            self._saver.start(partial(self._tell, copy, comparison))
        finally:
            self._staged.release()

    def secure(self, state: TrainState, *, reason: str, seconds: float) -> None:
        """See to it that the state is durable, whoever saves it. Raises `StorageError`.

        Ranks that are asked to do so at once let those before them save: the bytes are the same.
        """
        deadline = time.monotonic() + seconds
        patience = time.monotonic() + self.precede * min(limits.SECURE_SECONDS, seconds / 4)
        while time.monotonic() < patience:
            try:
                with within(patience - time.monotonic()):
                    self.writer.refresh()
            except StorageError:  # not there now; the save below tries until the limit
                break
            if self.is_durable(state):
                self._committer.publish()
                self._due.saved()
                return
            time.sleep(limits.LAZY_POLL_SECONDS)
        self.insist(state, reason=reason, seconds=deadline - time.monotonic())

    def insist(self, state: TrainState, *, reason: str, seconds: float, hurry: bool = True) -> None:
        """Make the state durable, trying again until the limit. Raises `StorageError` then.

        A save of this very state that is under way is waited for. An older one is given up: it
        would only be in the way. Not where there is no hurry, nor where saves take longer than
        there is time: then it is all that may still become durable.
        """
        deadline = time.monotonic() + seconds
        flight = self._flight
        if flight is not None and (flight.step >= state.step or self._committer.took > seconds):
            self._saver.wait(_SHARE_FOR_FLIGHT * seconds)
        elif flight is not None and not hurry:
            self._saver.wait(min(limits.LAND_SECONDS, _SHARE_FOR_FLIGHT * seconds))
        self._stop_flight(min(limits.ABANDON_SECONDS, seconds / 4))
        self._until(
            lambda: self._save_here(state, reason, deadline),
            "save failed",
            deadline - time.monotonic(),
        )

    def finish(self, state: TrainState, *, reason: str, seconds: float) -> None:
        """Record that the run is complete, trying again until the limit."""

        def append() -> None:
            self.writer.finish(step=state.step, reason=reason, metrics=state.metrics)

        self._until(append, "not recorded as finished", seconds)

    def is_finished(self, step: int) -> bool:
        """Whether the log says so now of a state of this step, or of one that came from it.

        Whoever goes on from a copy may stand before the end. Raises `FencedError`, `StorageError`.
        """
        finished = self.writer.refresh().finished_step
        return finished is not None and finished >= step

    def await_finish(
        self, state: TrainState, *, seconds: float, meanwhile: Callable[[], None]
    ) -> None:
        """Wait until the log says that the run is complete; `meanwhile` raises to end the wait."""
        deadline = time.monotonic() + seconds

        def look() -> None:
            while not self.is_finished(state.step):
                meanwhile()
                if time.monotonic() > deadline:
                    raise TransientError(
                        f"rank 0 did not finish the run in {seconds:g} s: start it again"
                    )
                time.sleep(limits.LAZY_POLL_SECONDS)

        self._until(look, "cannot see whether the run is finished", seconds)

    def take_back(self, state: TrainState, *, why: str) -> int | None:
        """Put checkpoints of just these weights in quarantine; return the newest step left, if any.

        They lead to a loss that is no number: whoever went on from them would end there again. In
        steps that were skipped nothing was learnt, so their checkpoints hold the same weights.
        Where none is left the run begins anew, from the initial weights.
        """
        self._land()
        since = state.step - state.skipped
        for each in reversed(self.writer.refresh().checkpoints):
            if each.step >= since:
                self.writer.quarantine(each, why=why)
        head = self.writer.head
        if head.committed and not head.checkpoints:
            self.writer.rollback(step=0, until=0, why=why)
        return self.writer.head.newest_step

    def roll_back(self, *, bad_step: int, why: str) -> None:
        """Cut the line before a step that has no loss: the steps up to it teach nothing then.

        The cut is at the newest checkpoint from which something was learnt since the last rollback:
        one that a rollback has gone back to, or passed over, leads to the same end. Raises
        `NoProgressError` where no other is left, and not even the initial weights.
        """
        self._land()
        head = self.writer.refresh()
        steps = [0, *(each.step for each in head.checkpoints if each.step <= bad_step)]
        for step in reversed(steps):
            if not any(first <= step <= until for first, until in head.passed_over):
                _events.warning(f"{why}: rolled back", to_step=step, passed_over_to=bad_step + 1)
                self.writer.rollback(step=step, until=bad_step + 1, why=why)
                return
        raise NoProgressError(
            f"{why}, again after the last rollback, and there is nothing left to go back to: lower "
            "--lr and start a new run"
        )

    def is_durable(self, state: TrainState) -> bool:
        """Whether the state's step is known to be durable.

        A step is saved once. Rows of an evaluation that came later travel with the next one.
        """
        return self._committer.has(state.step)

    def close(self) -> None:
        """Give up what is under way, and tell what nobody has asked for."""
        if self._flight is not None:
            self._flight.abandon()
        if not self._saver.close(limits.FAREWELL_SECONDS):
            _events.warning("a save does not end: storage does not answer", step=self._board.saving)
            return
        error = self._saver.error()
        if error is not None and not isinstance(error, AbandonedError):
            _events.warning("the last save failed", error=str(error))

    def _collect(self) -> None:
        """Take in how the last save has ended. Raises what training must not go on with."""
        busy = self._saver.busy  # first: it may end meanwhile, and would seem to have ended well
        error = self._saver.error()
        if busy and error is None:
            newest = self._committer.newest_step
            self._due.limit(newest_step=newest)
            if self._flight is not None:
                self._due.tell_of_long(
                    step=self._flight.step,
                    newest_step=newest,
                    usual_seconds=self._committer.took,
                )
            return
        flight, self._flight = self._flight, None
        match error:
            case None if flight is not None:
                self._due.committed()
                self.shown = flight.digest or self.shown[0], flight.step
                if self._pace is not None:
                    self._pace.saved(
                        pause_seconds=flight.pause_seconds, save_seconds=flight.seconds
                    )
            case None | AbandonedError():
                pass
            case DifferentStatesError() if flight is not None:
                self.shown = flight.digest or self.shown[0], flight.step
                self.differs = True
            case StorageError() if flight is not None:
                self._due.put_off(
                    error,
                    step=flight.step,
                    newest_step=self._committer.newest_step,
                    copied_step=self._committer.copied_step,
                )
            case _:
                raise error

    def _until(self, action: Callable[[], None], failed: str, seconds: float) -> None:
        began = time.monotonic()
        deadline = began + seconds
        while True:
            try:
                with within(deadline - time.monotonic()):
                    action()
            except StorageError as error:
                left = deadline - time.monotonic()
                if left < min(limits.LAST_TRY_SECONDS, seconds / 10):
                    unsaved = max(self._due.unsaved_seconds(), time.monotonic() - began)
                    newest = self._committer.newest_step
                    raise self._due.gave_up(error, unsaved, newest_step=newest) from error
                _events.warning(f"{failed}, trying again", error=str(error))
                time.sleep(min(limits.SAVE_RETRY_SECONDS, left / 2))
            else:
                return

    def _land(self) -> None:
        """Let a save that is under way come to its end, in time, or give it up."""
        if self._flight is not None:
            self._saver.wait(limits.LAND_SECONDS)
        self._stop_flight(limits.ABANDON_SECONDS)
        self._board.saving = 0

    def _stop_flight(self, seconds: float) -> None:
        """Give up the save that is under way; one that does not end can only append an old step."""
        flight = self._flight
        if flight is None:
            return
        flight.abandon()
        if not self._saver.wait(seconds):
            _events.warning("a save is given up and does not end", step=flight.step)
            return
        self._flight = None
        match self._saver.error():
            case None | AbandonedError():
                pass
            case (DifferentStatesError() | FencedError()) as error:
                raise error
            case error:  # what follows saves by itself, or finds the same
                _events.warning("a save failed", step=flight.step, error=str(error))

    def _save_here(self, state: TrainState, reason: str, deadline: float) -> None:
        """Save on this thread, with memory of its own where the other one still uses the copy."""
        if not self._staged.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise StorageError("another thread of this process has been saving until now")
        try:
            if not self.is_durable(state):
                self._committer.commit(self._copy(state, reason), UNWATCHED)
            self._due.saved()
        finally:
            self._staged.release()

    def _copy(self, state: TrainState, reason: str) -> Copy:
        """Copy the state: into the memory made for it, unless a save that hangs still uses that."""
        free = None if self._saver.busy else self._staging
        copy = Copy.of(
            state,
            free,
            reason=reason,
            epochs_done=self._plan.epochs_done,
            interval=self._pace.interval if self._pace is not None else None,
        )
        if not self._saver.busy:
            self._staging = copy.staging
        return copy

    def _fly(self, copy: Copy, flight: Flight) -> None:
        began = time.monotonic()
        self._committer.commit(copy, flight)
        flight.seconds = time.monotonic() - began
        if self._pace is not None and not self._pace.is_read:
            self._pace.read()

    def _tell(self, copy: Copy, comparison: Comparison) -> None:
        digest = digest_of(describe(copy.staging.files()), step=copy.step)
        self.shown = digest, copy.step
        try:
            comparison.tell(copy.step, digest)
        except StoreLostError as error:  # the main thread finds out when it needs its peers
            _events.info("not compared", step=copy.step, why=str(error))
