"""When to save, who saves, and what becomes of a save that fails.

Rank 0 saves when a checkpoint is due. Any rank may save at the end (drain, lost peers): all hold
the same state, and the log admits a step once. Any thread may ask for it.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from fmnist_dist import limits
from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import DamagedRecordError
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.checkpoint.writer import RunWriter, Snapshot
from fmnist_dist.config import Config
from fmnist_dist.errors import NoProgressError, TransientError
from fmnist_dist.plan import Plan
from fmnist_dist.state import Durable, TrainState
from fmnist_dist.telemetry.events import EventLog
from fmnist_dist.telemetry.progress import Progress

_events = EventLog("fmnist_dist.saves")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When a checkpoint is due: at every epoch's end, and as the user asked."""

    every_steps: int | None
    every_seconds: float | None

    def reason(self, *, step: int, ends_epoch: bool, seconds_since: float) -> str | None:
        """Return why a checkpoint is due after `step` steps, None if it is not."""
        if ends_epoch:
            return "epoch"
        if self.every_steps is not None and step % self.every_steps == 0:
            return "steps"
        if self.every_seconds is not None and seconds_since >= self.every_seconds:
            return "seconds"
        return None


class Saves:
    """Saves the state, and keeps training alive while storage is away.

    `write` returns this rank's writer; it is asked once, when something is to be written or read.
    `precede` is how many living ranks are to try before this one, so that one writes and all see.
    `retires` is for one rank, which reads every retained checkpoint once; `save` is
    `RunWriter.save`, perhaps with faults.
    """

    def __init__(
        self,
        write: Callable[[], RunWriter],
        log: RunLog,
        config: Config,
        plan: Plan,
        progress: Progress,
        *,
        retires: bool,
        save: Callable[[RunWriter, Snapshot], bool] = RunWriter.save,
    ) -> None:
        self._write = write
        self._retires = retires
        self._save_with = save
        self._log = log
        self._writer: RunWriter | None = None
        self._config = config
        self._plan = plan
        self._progress = progress
        self._schedule = Schedule(
            every_steps=config.save_every_steps, every_seconds=config.save_every_seconds
        )
        self._durable_at = time.monotonic()
        self._retry_at: float | None = None
        self._busy = threading.Lock()
        self._newest: Durable | None = None
        self.precede = 0

    @property
    def writer(self) -> RunWriter:
        """This rank's writer. Raises `FencedError`, `StorageError`."""
        if self._writer is None:
            self._writer = self._write()
        return self._writer

    @property
    def newest(self) -> Durable | None:
        """What is durable, as rank 0 tells the others with every step."""
        head = self.writer.head
        retained = head.checkpoints[-1] if head.checkpoints else None
        if retained is not None and (self._newest is None or self._newest.index != retained.index):
            try:
                found = lineage.commit(self._log, retained.index).checkpoint
            except (DamagedRecordError, StorageError):  # rows are saved twice rather than never
                return self._newest
            self._newest = Durable(
                index=retained.index,
                step=found.step,
                epoch=found.ledger[-1].epoch if found.ledger else 0,
                evaluated=found.evaluated,
            )
        return self._newest

    def wants(self, step: int, *, ends_epoch: bool) -> bool:
        """Whether `offer` would save after `step` steps, as far as one can know before them."""
        return self._reason(step, ends_epoch=ends_epoch) is not None

    def offer(self, state: TrainState, *, ends_epoch: bool) -> None:
        """Save if one is due. Raises `FencedError`, and `StorageError` after the limit only."""
        reason = self._reason(state.step, ends_epoch=ends_epoch)
        if reason is None or self.is_durable(state):
            return
        try:
            self._save(state, reason)
        except StorageError as error:
            unsaved = time.monotonic() - self._durable_at
            if unsaved > self._config.max_unsaved_seconds:
                raise self._gave_up(error, unsaved) from error
            self._retry_at = time.monotonic() + limits.SAVE_RETRY_SECONDS
            _events.warning(
                "save failed, training goes on",
                step=state.step,
                error=str(error),
                newest_checkpoint=self._newest_step,
                unsaved_seconds=round(unsaved),
                gives_up_after_seconds=self._config.max_unsaved_seconds,
            )

    def secure(self, state: TrainState, *, reason: str, seconds: float) -> None:
        """See to it that the state is durable, whoever saves it. Raises `StorageError`.

        Ranks that are asked to do so at once let those before them save: the bytes are the same.
        """
        deadline = time.monotonic() + seconds
        patience = time.monotonic() + self.precede * min(limits.SECURE_SECONDS, seconds / 4)
        while time.monotonic() < patience:
            try:
                self.writer.refresh()
            except StorageError:  # not there now; the save below tries until the limit
                break
            if self.is_durable(state):
                return
            time.sleep(limits.LAZY_POLL_SECONDS)
        self.insist(state, reason=reason, seconds=deadline - time.monotonic())

    def insist(self, state: TrainState, *, reason: str, seconds: float) -> None:
        """Make the state durable, trying again until the limit. Raises `StorageError` then."""
        self._until(lambda: self._save(state, reason), "save failed", seconds)

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
        since = state.step - state.skipped
        for each in reversed(self.writer.head.checkpoints):
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
        return self._newest_step is not None and state.step <= self._newest_step

    @property
    def _newest_step(self) -> int | None:
        return self._writer.head.newest_step if self._writer is not None else None

    def _reason(self, step: int, *, ends_epoch: bool) -> str | None:
        now = time.monotonic()
        if self._retry_at is not None:
            return "retry" if now >= self._retry_at else None
        return self._schedule.reason(
            step=step, ends_epoch=ends_epoch, seconds_since=now - self._durable_at
        )

    def _until(self, action: Callable[[], None], failed: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                action()
            except StorageError as error:
                if time.monotonic() > deadline:
                    raise self._gave_up(error, time.monotonic() - self._durable_at) from error
                _events.warning(f"{failed}, trying again", error=str(error))
                left = deadline - time.monotonic()
                time.sleep(max(0.0, min(limits.SAVE_RETRY_SECONDS, left)))
            else:
                return

    def _gave_up(self, error: StorageError, seconds: float) -> StorageError:
        newest = "none" if self._newest_step is None else f"step {self._newest_step}"
        return StorageError(
            f"storage has failed for {seconds:.0f} s (limit --max-unsaved-seconds "
            f"{self._config.max_unsaved_seconds:g}): {error}; newest checkpoint: {newest}; free "
            "space or bring the storage back, then the same command goes on"
        )

    def _save(self, state: TrainState, reason: str) -> None:
        with self._busy:
            writer = self.writer
            if self.is_durable(state):
                return
            started = time.monotonic()
            snapshot = self._snapshot(state, reason)
            try:
                saved = self._save_with(writer, snapshot)
            except StorageError:
                with suppress(StorageError):  # away for this, too
                    writer.refresh()  # a newer attempt sweeps files under way: then it is fenced
                raise
            self._durable_at = time.monotonic()
            self._retry_at = None
            if not saved:  # another rank was faster
                return
            self._progress.saved(snapshot.step)
            _events.info(
                "saved",
                step=snapshot.step,
                reason=reason,
                bytes=sum(map(len, snapshot.files.values())),
                seconds=round(self._durable_at - started, 3),
            )
            if self._retires:
                self._retire(writer)

    def _snapshot(self, state: TrainState, reason: str) -> Snapshot:
        with state.still():
            self.writer.parent = state.parent
            return Snapshot(
                step=state.step,
                epoch=self._plan.epochs_done(state.step),
                reason=reason,
                files=state.files(),
                ledger=state.ledger,
                evaluated=state.evaluated,
                metrics=dict(state.metrics),
            )

    def _retire(self, writer: RunWriter) -> None:
        try:
            writer.retire(keep_last=self._config.keep_last, keep_every=self._config.keep_every)
        except StorageError as error:
            _events.warning("old checkpoints were not deleted", error=str(error))
