"""A signal's wish to stop, which the next step carries to all ranks.

The handler only sets a flag. Each step adds the flags of all ranks up with its other sums, so every
rank stops after the same step, and none waits for one that has left.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.requested = True


@contextmanager
def listen() -> Iterator[StopRequest]:
    """Take SIGTERM and SIGINT as a wish to stop after the current step."""
    request = StopRequest()
    before = {number: signal.signal(number, request._handle) for number in _SIGNALS}  # noqa: SLF001
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
