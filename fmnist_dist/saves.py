"""When to save, and what becomes of a save that fails. Rank 0 has one; the others have None."""

import time
from dataclasses import dataclass

from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.checkpoint.writer import RunWriter, Snapshot
from fmnist_dist.config import Config
from fmnist_dist.plan import Plan
from fmnist_dist.state import TrainState
from fmnist_dist.telemetry.events import EventLog
from fmnist_dist.telemetry.progress import Progress

RETRY_SECONDS = 5.0  # after a save that failed; storage that is full or away stays so for a while

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
    """Saves the state on rank 0, and keeps training alive while storage is away."""

    def __init__(self, writer: RunWriter, config: Config, plan: Plan, progress: Progress) -> None:
        self._writer = writer
        self._config = config
        self._plan = plan
        self._progress = progress
        self._schedule = Schedule(
            every_steps=config.save_every_steps, every_seconds=config.save_every_seconds
        )
        self._durable_at = time.monotonic()
        self._retry_at: float | None = None
        self._durable_step: int | None = writer.head.newest_step

    def offer(self, state: TrainState, *, ends_epoch: bool) -> None:
        """Save if one is due. Raises `FencedError`, and `StorageError` after the limit only."""
        now = time.monotonic()
        if self._retry_at is not None:
            reason = "retry" if now >= self._retry_at else None
        else:
            reason = self._schedule.reason(
                step=state.step, ends_epoch=ends_epoch, seconds_since=now - self._durable_at
            )
        if reason is None or self._is_durable(state):
            return
        try:
            self._save(state, reason)
        except StorageError as error:
            unsaved = time.monotonic() - self._durable_at
            if unsaved > self._config.max_unsaved_seconds:
                raise self._gave_up(error, unsaved) from error
            self._retry_at = time.monotonic() + RETRY_SECONDS
            _events.warning(
                "save failed, training goes on",
                step=state.step,
                error=str(error),
                newest_checkpoint=self._durable_step,
                unsaved_seconds=round(unsaved),
                gives_up_after_seconds=self._config.max_unsaved_seconds,
            )

    def insist(self, state: TrainState, *, reason: str, limit_seconds: float) -> None:
        """Make the state durable, trying again until the limit. Raises `StorageError` then."""
        deadline = time.monotonic() + limit_seconds
        while not self._is_durable(state):
            try:
                self._save(state, reason)
            except StorageError as error:
                if time.monotonic() > deadline:
                    raise self._gave_up(error, time.monotonic() - self._durable_at) from error
                _events.warning("save failed, trying again", step=state.step, error=str(error))
                time.sleep(RETRY_SECONDS)

    def finish(self, state: TrainState, *, reason: str, limit_seconds: float) -> None:
        """Record that the run is complete, trying again until the limit."""
        deadline = time.monotonic() + limit_seconds
        while True:
            try:
                self._writer.finish(step=state.step, reason=reason, metrics=state.metrics)
            except StorageError as error:
                if time.monotonic() > deadline:
                    raise self._gave_up(error, limit_seconds) from error
                _events.warning("not recorded as finished, trying again", error=str(error))
                time.sleep(RETRY_SECONDS)
            else:
                return

    def take_back(self, state: TrainState, *, why: str) -> int | None:
        """Put a checkpoint of just this state in quarantine; return the newest step left, if any.

        Its weights lead to a loss that is no number: whoever went on from it would end there again.
        """
        newest = self._writer.head.checkpoints[-1:]
        if newest and newest[0].step == state.step:
            self._writer.quarantine(newest[0], why=why)
        return self._writer.head.newest_step

    def _is_durable(self, state: TrainState) -> bool:
        # A step is saved once. Rows of an evaluation that came later travel with the next one.
        return self._durable_step is not None and state.step <= self._durable_step

    def _gave_up(self, error: StorageError, seconds: float) -> StorageError:
        newest = "none" if self._durable_step is None else f"step {self._durable_step}"
        return StorageError(
            f"storage has failed for {seconds:.0f} s (limit --max-unsaved-seconds "
            f"{self._config.max_unsaved_seconds:g}): {error}; newest checkpoint: {newest}; free "
            "space or bring the storage back, then the same command goes on"
        )

    def _save(self, state: TrainState, reason: str) -> None:
        started = time.monotonic()
        files = state.files()
        self._writer.save(
            Snapshot(
                step=state.step,
                epoch=self._plan.epochs_done(state.step),
                reason=reason,
                files=files,
                ledger=state.ledger,
                evaluated=state.evaluated,
                metrics=state.metrics,
            )
        )
        state.saved()
        self._durable_step = state.step
        self._durable_at = time.monotonic()
        self._retry_at = None
        self._progress.saved(state.step)
        _events.info(
            "saved",
            step=state.step,
            reason=reason,
            bytes=sum(map(len, files.values())),
            seconds=round(self._durable_at - started, 3),
        )
        try:
            self._writer.retire(
                keep_last=self._config.keep_last, keep_every=self._config.keep_every
            )
        except StorageError as error:
            _events.warning("old checkpoints were not deleted", error=str(error))
