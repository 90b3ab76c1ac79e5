"""The progress bar of a terminal, and the way of log lines past it.

    epoch 3/10 ━━━━━━━━╸━━━━━━━ 1234/4690 loss 0.4123 1650 images/s 0:03:10 saved 1200

Without rich's refresh thread: threads must not cross a fork, and drawing from `update` bounds the
cost. While the bar lives, log lines go through its console, which prints them above it.
"""

import io
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from fmnist_dist.telemetry.events import divert
from fmnist_dist.telemetry.extent import Extent

# One drawing takes 2 to 3 ms beside busy cores: two a second are 0.5 % of a core at any step time.
DRAW_EVERY_SECONDS = 0.5


class BarProgress:
    """One line that moves. A terminal that goes away ends the bar, never the training."""

    def __init__(self, *, stream: TextIO, extent: Extent, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._drawn_at = clock()
        self._num_epochs = extent.num_epochs
        self._last: tuple[int, int, float, float] | None = None  # not drawn yet
        self._saved = ""
        self._is_alive = True
        self._console = Console(file=stream, force_terminal=True)
        self._bar = _rich_progress(self._console, clock)
        self._task = self._bar.add_task(
            f"epoch -/{extent.num_epochs}",
            total=extent.total_steps,
            completed=extent.first_step,
            numbers="",
            saved="",
        )
        self._bar.start()
        self._console.show_cursor(True)  # a SIGKILL must not leave a terminal without one
        self._stream_before = divert(cast("TextIO", _AboveBar(self._console)))

    def update(
        self, *, epoch: int, step: int, loss: float, images_per_second: float, ends_epoch: bool
    ) -> None:
        self._last = (epoch, step, loss, images_per_second)
        now = self._clock()
        if ends_epoch or now - self._drawn_at >= DRAW_EVERY_SECONDS:
            self._drawn_at = now
            self._draw()

    def saved(self, step: int) -> None:
        self._saved = f"saved {step}"  # drawn with the next update, so no lock is needed

    def close(self) -> None:
        self._draw()
        self._end()

    def _draw(self) -> None:
        if self._last is None or not self._is_alive:
            return
        epoch, step, loss, images_per_second = self._last
        try:
            self._bar.update(
                self._task,
                description=f"epoch {epoch}/{self._num_epochs}",
                completed=step,
                numbers=f"loss {loss:.4f} {images_per_second:.0f} images/s",
                saved=self._saved,
                refresh=True,
            )
        except OSError:
            self._end()

    def _end(self) -> None:
        if not self._is_alive:
            return
        self._is_alive = False
        if self._stream_before is not None:
            divert(self._stream_before)
        with suppress(OSError):
            self._bar.stop()


class _AboveBar(io.TextIOBase):
    """What logging writes here is printed above the bar, unwrapped and unstyled."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str, /) -> int:
        self._console.out(text, end="", highlight=False)
        return len(text)


def _rich_progress(console: Console, clock: Callable[[], float]) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[saved]}"),
        console=console,
        get_time=clock,
        expand=True,
        auto_refresh=False,
    )
