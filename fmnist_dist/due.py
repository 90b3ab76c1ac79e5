"""When a save is due, and for how long one that was due has not come about."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from fmnist_dist import limits
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.config import Config
from fmnist_dist.telemetry.events import EventLog

_events = EventLog("fmnist_dist.saves")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When a checkpoint is due: at every epoch's end, and as the user asked."""

    every_steps: int | None
    every_seconds: float | None

    def reason(self, *, step: int, ends_epoch: bool, seconds_since: float) -> str | None:
        """Return why a checkpoint is due after `step` steps, None if it is not.

        `seconds_since` counts from when the newest one was copied.
        """
        if ends_epoch:
            return "epoch"
        if self.every_steps is not None and step % self.every_steps == 0:
            return "steps"
        if self.every_seconds is not None and seconds_since >= self.every_seconds:
            return "seconds"
        return None


class Due:
    """The schedule, and what is due beyond it: what had to wait, what has failed.

    `at_once`: a save had begun, and has died with the trainer before this one. `paced` says
    whether a save is due so many seconds after the last one, where the program chooses that.
    """

    def __init__(
        self,
        config: Config,
        *,
        at_once: bool,
        paced: Callable[[float], bool] = lambda _: False,
    ) -> None:
        every_steps = config.save_every_steps
        self._schedule = Schedule(
            every_steps=every_steps if isinstance(every_steps, int) else None,
            every_seconds=config.save_every_seconds,
        )
        self._paced = paced
        self._limit = config.max_unsaved_seconds
        now = time.monotonic()
        self._copied_at = now
        self._waiting: str | None = "retry" if at_once else None  # why the next one is due
        self._waiting_since = now
        self._unsaved_since: float | None = None  # the oldest state that should be durable
        self._retry_at: float | None = None
        self._has_told = False  # that the save under way takes long

    def reason(self, step: int, *, ends_epoch: bool) -> str | None:
        """Return why the state of a step should be saved; None if it need not, or not yet."""
        now = time.monotonic()
        if self._retry_at is not None:
            return "retry" if now >= self._retry_at else None
        since = now - self._copied_at
        reason = self._waiting or self._schedule.reason(
            step=step, ends_epoch=ends_epoch, seconds_since=since
        )
        if reason is None and self._paced(since):
            return "auto"
        return reason

    def remember(self, reason: str) -> None:
        """Have a save that cannot be made now be due until it is."""
        if self._waiting is None:
            self._waiting, self._waiting_since = reason, time.monotonic()
            self._unsaved_since = self._unsaved_since or self._waiting_since

    def copied(self) -> None:
        """A save has begun: of the newest state, so nothing else waits any more."""
        self._copied_at = time.monotonic()
        self._unsaved_since = self._unsaved_since or self._copied_at
        self._waiting = None
        self._has_told = False

    def committed(self) -> None:
        """That save is durable; what has fallen due since is not."""
        self._unsaved_since = None if self._waiting is None else self._waiting_since
        self._retry_at = None

    def saved(self) -> None:
        """The newest state is durable, whoever has saved it."""
        self.copied()
        self.committed()

    def put_off(
        self,
        error: StorageError,
        *,
        step: int,
        newest_step: int | None,
        copied_step: int | None,
    ) -> None:
        """Warn, and try again later: training goes on. Raises `StorageError` after the limit."""
        unsaved = self.unsaved_seconds()
        if unsaved > self._limit:
            raise self.gave_up(error, unsaved, newest_step=newest_step) from error
        self._retry_at = time.monotonic() + limits.SAVE_RETRY_SECONDS
        _events.warning(
            "save failed, training goes on",
            step=step,
            error=str(error),
            newest_checkpoint="none" if newest_step is None else newest_step,
            **({} if copied_step is None else {"newest_local_copy": copied_step}),
            unsaved_seconds=round(unsaved),
            gives_up_after_seconds=self._limit,
        )

    def limit(self, *, newest_step: int | None) -> None:
        """Raise `StorageError` where a save that is under way has taken too long."""
        unsaved = self.unsaved_seconds()
        if unsaved > self._limit:
            error = StorageError("a save does not come to an end")
            raise self.gave_up(error, unsaved, newest_step=newest_step)

    def tell_of_long(self, *, step: int, newest_step: int | None, usual_seconds: float) -> None:
        """Warn, once, of a save that takes long: its storage may say nothing for a minute."""
        seconds = time.monotonic() - self._copied_at
        if not self._has_told and seconds > max(limits.LONG_SAVE_SECONDS, 3 * usual_seconds):
            self._has_told = True
            _events.warning(
                "a save takes long, training goes on",
                step=step,
                seconds=round(seconds),
                newest_checkpoint="none" if newest_step is None else newest_step,
            )

    def unsaved_seconds(self) -> float:
        """Return for how long a state that was to be saved has not been durable."""
        now = time.monotonic()
        return now - (self._unsaved_since or now)

    def gave_up(
        self, error: StorageError, seconds: float, *, newest_step: int | None
    ) -> StorageError:
        newest = "none" if newest_step is None else f"step {newest_step}"
        return StorageError(
            f"storage has failed for {seconds:.0f} s (limit --max-unsaved-seconds "
            f"{self._limit:g}): {error}; newest checkpoint: {newest}; free space or bring the "
            "storage back, then the same command goes on"
        )
