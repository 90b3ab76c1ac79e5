"""How often `--save-every-steps auto` saves: chosen again after every save, told and recorded."""

import time

from fmnist_dist.checkpoint.interruptions import last_interval, read_evidence
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.errors import DataDamagedError
from fmnist_dist.interval import Cost, Evidence, Interval, choose
from fmnist_dist.telemetry.events import EventLog

_TELL_AGAIN = 1.2  # a change by this factor is worth a line

_events = EventLog("fmnist_dist.pace")


class Pace:
    """The interval in force, for the one process that saves when a checkpoint is due.

    It goes on from what the run's log tells: interruptions, and what saves cost the last time.
    `interval` is None until the first question whether a save is due.
    """

    def __init__(self, log: RunLog) -> None:
        self._log = log
        self.interval: Interval | None = None
        self._evidence = Evidence()
        self._began = 0.0  # when the evidence was read
        self._since = (0, 0.0)  # the step and the time of the last save, or of the beginning
        self._told_seconds: float | None = None

    def is_due(self, *, step: int, seconds_since: float) -> bool:
        """Whether to save after `step` steps, so long after the last save."""
        interval = self.interval or self._begin(step)
        return seconds_since >= interval.seconds

    def saved(self, *, step: int, cost: Cost) -> None:
        """Choose again, from what a save just made of this step has cost."""
        interval = self.interval or self._begin(step)
        now = time.monotonic()
        since_step, since = self._since
        trained = now - since - cost.pause_seconds
        self._since = (step, now)
        self._choose(
            cost.after(interval.cost),
            step_seconds=trained / (step - since_step)
            if step > since_step and trained > 0
            else interval.step_seconds,
        )

    def _begin(self, step: int) -> Interval:
        now = time.monotonic()
        self._began, self._since = now, (step, now)
        last: Interval | None = None
        try:
            head = self._log.read().head
            self._evidence = read_evidence(self._log, head)
            last = last_interval(self._log, head)
        except (StorageError, DataDamagedError) as error:
            _events.warning("interruptions so far are not known", why=str(error))
        return self._choose(
            last.cost if last else None, step_seconds=last.step_seconds if last else 0.0
        )

    def _choose(self, cost: Cost | None, *, step_seconds: float) -> Interval:
        seconds = self._evidence.seconds + time.monotonic() - self._began
        evidence = Evidence(interruptions=self._evidence.interruptions, seconds=seconds)
        self.interval = choose(cost=cost, evidence=evidence, step_seconds=step_seconds)
        self._tell(self.interval)
        return self.interval

    def _tell(self, interval: Interval) -> None:
        told = self._told_seconds
        if told is not None and told / _TELL_AGAIN < interval.seconds < told * _TELL_AGAIN:
            return
        self._told_seconds = interval.seconds
        steps = {"steps": interval.steps} if interval.step_seconds > 0 else {}
        _events.info("save interval", seconds=round(interval.seconds, 1), **steps, why=interval.why)
