"""How often `--save-every-steps auto` saves: chosen again after every save, told and recorded."""

import time

from fmnist_dist.checkpoint.interruptions import last_interval, read_evidence
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.errors import DataDamagedError
from fmnist_dist.interval import Cost, Evidence, Interval, choose
from fmnist_dist.steptimes import StepTimes
from fmnist_dist.telemetry.events import EventLog

_TELL_AGAIN = 1.2  # a change by this factor is worth a line

_events = EventLog("fmnist_dist.pace")


class Pace:
    """The interval in force, for the one process that saves when a checkpoint is due.

    It goes on from what the run's log tells, once that was read: interruptions, and what saves
    cost the last time.
    """

    def __init__(self, log: RunLog) -> None:
        self._log = log
        self._evidence = Evidence()
        self.interval = choose(cost=None, evidence=self._evidence, step_seconds=0.0)
        self.is_read = False
        self._read_at = 0.0  # when the evidence was
        self._steps = StepTimes()
        self._turn_at: float | None = None  # when the step under way began, unless it is no measure
        self._is_beside = False  # a save is under way in it
        self._num_beside = 0  # steps beside the save under way
        self._told_seconds: float | None = None

    def read(self) -> None:
        """Read the run's history: a few records, of the newest attempts. On any thread."""
        last: Interval | None = None
        try:
            head = self._log.read().head
            self._evidence = read_evidence(self._log, head)
            last = last_interval(self._log, head)
        except (StorageError, DataDamagedError) as error:
            _events.warning("interruptions so far are not known", why=str(error))
        self._read_at = time.monotonic()
        self.is_read = True
        self._choose(last.cost if last else None, step_seconds=last.step_seconds if last else 0.0)

    def is_due(self, seconds_since: float) -> bool:
        """Whether to save, so long after the last copy."""
        return seconds_since >= self.interval.seconds

    def stepping(self, *, beside_save: bool) -> None:
        """Note that a step begins; what came since the last call was one step, or is left out."""
        now = time.monotonic()
        if self._turn_at is not None:
            self._steps.add(now - self._turn_at, beside_save=self._is_beside)
            self._num_beside += self._is_beside
        self._turn_at, self._is_beside = now, beside_save

    def leave_out(self) -> None:
        """Note that the step under way is none to measure: a copy is made in it."""
        self._turn_at, self._is_beside = None, False
        self._num_beside = 0

    def saved(self, *, pause_seconds: float, save_seconds: float) -> None:
        """Choose again, from a save that is durable now.

        Training stood still for `pause_seconds`; the save was under way for `save_seconds`.
        """
        num_beside = self._num_beside + self._is_beside
        slowdown = num_beside * self._steps.slowdown_seconds
        cost = Cost(pause_seconds=pause_seconds + slowdown, save_seconds=save_seconds)
        step_seconds = self._steps.step_seconds or self.interval.step_seconds
        self._choose(cost.after(self.interval.cost), step_seconds=step_seconds)

    def _choose(self, cost: Cost | None, *, step_seconds: float) -> None:
        seconds = self._evidence.seconds + time.monotonic() - self._read_at
        evidence = Evidence(interruptions=self._evidence.interruptions, seconds=seconds)
        self.interval = choose(cost=cost, evidence=evidence, step_seconds=step_seconds)
        self._tell(self.interval)

    def _tell(self, interval: Interval) -> None:
        told = self._told_seconds
        if told is not None and told / _TELL_AGAIN < interval.seconds < told * _TELL_AGAIN:
            return
        self._told_seconds = interval.seconds
        steps = {"steps": interval.steps} if interval.step_seconds > 0 else {}
        _events.info("save interval", seconds=round(interval.seconds, 1), **steps, why=interval.why)
