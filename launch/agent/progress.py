"""How far the run is, as the agent can know it: from the hints on this node, and from its log."""

import time
from concurrent.futures import Future
from dataclasses import dataclass

from fmnist_dist.checkpoint.hint import read_hints
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.place import Place
from fmnist_dist.telemetry.events import EventLog
from launch.agent import limits
from launch.agent.aside import aside

_events = EventLog("launch.agent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    attempt: int  # the newest one; 0: none yet
    step: int  # that it has finished, as far as this node knows
    furthest: int  # step of any attempt
    checkpoint_step: int | None  # the newest one that is committed


class Progress:
    """The newest that is known of a run."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._log: RunLog | None = None
        self._reading: Future[Reached] | None = None
        self._looked_at = float("-inf")
        self._has_warned = False
        self.latest: Reached | None = None
        self.is_known = False  # what `latest` says was read by the last look

    def look(self, *, now: bool = False) -> bool:
        """Have it read, at the latest some seconds after the last time; return whether that ended.

        False while it is being read. What cannot be read stays as it was, and is not known.
        """
        if self._reading is None:
            if not now and time.monotonic() < self._looked_at + limits.LOOK_SECONDS:
                return True
            self._reading = aside(self._read, name="progress")
        if not self._reading.done():
            return False
        reading, self._reading, self._looked_at = self._reading, None, time.monotonic()
        error = reading.exception()
        self.is_known = error is None
        if error is None:
            self.latest = reading.result()
        elif not self._has_warned:  # whatever it is: no reason to end workers that train
            why = f"{type(error).__name__}: {error}"
            _events.warning("the run cannot be read by the agent", why=why)
            self._has_warned = True
        return True

    def _read(self) -> Reached:
        hints = read_hints(self._place.notes)
        self._log = self._log or RunLog(self._place.storage())
        head = self._log.read().head
        newest = hints[max(hints)].last_step if hints else 0
        saved = head.newest_step
        furthest = max([saved or 0, *(each.last_step for each in hints.values())])
        knows = bool(hints) and max(hints) >= head.attempt
        return Reached(
            attempt=max([head.attempt, *hints]),
            step=newest if knows else max(newest, saved or 0),
            furthest=furthest,
            checkpoint_step=saved,
        )
