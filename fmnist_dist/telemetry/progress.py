"""How far the run is: a bar on a terminal, a line every ten seconds elsewhere, nothing off rank 0.

Log lines and progress lines are events of the same stream, so JSON comes for free; only the bar
needs `rich`, which is imported with `bar` and not before.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, TextIO

from fmnist_dist.telemetry.events import EventLog, LogFormat
from fmnist_dist.telemetry.extent import Extent

LINE_EVERY_SECONDS = 10.0
# Time left comes from the speed since the line before the last three: one slow save or evaluation
# does not throw it, and a world that has shrunk shows within half a minute.
_NUM_MARKS = 4


class Progress(Protocol):
    """Told by the loop what happened; called after every step, so it must cost microseconds."""

    def update(
        self, *, epoch: int, step: int, loss: float, images_per_second: float, ends_epoch: bool
    ) -> None:
        """`step` steps are done, the last one in `epoch` (1 is the first) and ending it or not.

        `step` may fall, after a heal or a rollback.
        """

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is durable. May be called from any thread."""

    def close(self) -> None:
        """Show the last state and give the terminal back; afterwards only `close` may be called."""


def is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn there: no file or pipe, and more than a line printer."""
    return stream.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}


def make_progress(
    *,
    log_format: LogFormat,
    rank: int,
    stream: TextIO,
    stream_is_terminal: bool,
    extent: Extent,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Choose once, at start. `stream` is where `events.configure` sends the log lines."""
    if rank != 0:
        return NullProgress()
    if stream_is_terminal and log_format == "text":
        # rich takes 0.1 s to import and a pod has no terminal.
        from fmnist_dist.telemetry.bar import BarProgress  # noqa: PLC0415

        return BarProgress(stream=stream, extent=extent, clock=clock)
    return LineProgress(extent=extent, clock=clock)


class NullProgress:
    """The silence of ranks other than 0."""

    def update(
        self, *, epoch: int, step: int, loss: float, images_per_second: float, ends_epoch: bool
    ) -> None:
        pass

    def saved(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class LineProgress:
    """A `progress` event about every ten seconds, at the end of every epoch and at the end."""

    def __init__(self, *, extent: Extent, clock: Callable[[], float]) -> None:
        self._extent = extent
        self._clock = clock
        self._log = EventLog("fmnist_dist.progress")
        self._marks = deque([(clock(), extent.first_step)], maxlen=_NUM_MARKS)
        self._last: tuple[int, int, float, float] | None = None  # not said yet
        self._checkpoint: int | None = None

    def update(
        self, *, epoch: int, step: int, loss: float, images_per_second: float, ends_epoch: bool
    ) -> None:
        self._last = (epoch, step, loss, images_per_second)
        now = self._clock()
        if ends_epoch or now - self._marks[-1][0] >= LINE_EVERY_SECONDS:
            self._say(now)

    def saved(self, step: int) -> None:
        self._checkpoint = step

    def close(self) -> None:
        self._say(self._clock())

    def _say(self, now: float) -> None:
        if self._last is None:
            return
        epoch, step, loss, images_per_second = self._last
        self._last = None
        self._log.info(
            "progress",
            epoch=epoch,
            num_epochs=self._extent.num_epochs,
            step=step,
            total_steps=self._extent.total_steps,
            loss=loss,
            images_per_second=round(images_per_second, 1),
            seconds_left=self._seconds_left(now, step),
            checkpoint=self._checkpoint,
        )

    def _seconds_left(self, now: float, step: int) -> int | None:
        """None while nothing is known, as after a step back."""
        if step < self._marks[-1][1]:
            self._marks.clear()
        self._marks.append((now, step))
        then, step_then = self._marks[0]
        if step == step_then:
            return None
        return round((self._extent.total_steps - step) * (now - then) / (step - step_then))
