"""How long each phase of a start took, from the process's own start to its first finished step."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from fmnist_dist.telemetry.events import EventLog

P = ParamSpec("P")
R = TypeVar("R")

_events = EventLog("fmnist_dist.phases")


class Phases:
    """A stop-watch that began when the operating system started this process."""

    def __init__(self) -> None:
        self._started = time.monotonic() - seconds_alive()
        self._last = self._started
        self._seconds: dict[str, float] = {}

    def ended(self, name: str) -> None:
        now = time.monotonic()
        self._seconds[name] = round(now - self._last, 3)
        self._last = now

    def time_first(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return `function`, with its first call ending the last phase and telling all of them."""
        told = False

        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal told
            result = function(*args, **kwargs)
            if not told:
                told = True
                self.ended("first_step")
                total = round(self._last - self._started, 3)
                _events.info("started", seconds=total, **self._seconds)
            return result

        return timed


def seconds_alive() -> float:
    """Return how long this process has run (Linux); 0.0 elsewhere."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return 0.0
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
