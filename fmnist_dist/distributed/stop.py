"""A signal's wish to stop, which the next step carries to all ranks.

Python runs signal handlers on the main thread, and not while that is blocked in a collective. The
interpreter's own handler, in C, also writes the signal's number into a pipe: a second thread (see
`lookout`) reads it there, whatever the main one does.

Each step adds the flags of all ranks up with its other sums, so every rank stops after the same
step, and none waits for one that has left.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from fmnist_dist.errors import Drained

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: Slurm's notice of preemption


class StopRequest:
    """Whether this process was asked to stop, since when, and whether to do so at once."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor  # readable when a signal has come
        self.since: float | None = None  # on the monotonic clock
        self.num_interrupts = 0

    @property
    def requested(self) -> bool:
        return self.since is not None

    def ask(self) -> None:
        if self.since is None:
            self.since = time.monotonic()

    def read(self) -> None:
        """Take in the signals that have come."""
        try:
            numbers = os.read(self.descriptor, 256)
        except BlockingIOError:
            return
        for number in numbers:
            if number in SIGNALS:
                self.ask()
                self.num_interrupts += number == signal.SIGINT

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.ask()


@contextmanager
def listen() -> Iterator[StopRequest]:
    """Take SIGTERM, SIGINT and SIGUSR1 as a wish to stop after the current step.

    Afterwards they are ignored, see `handled_to_the_end`.
    """
    with woken_by_signals() as (readable, _):
        request = StopRequest(readable)
        with handled_to_the_end(request._handle):  # noqa: SLF001
            yield request


@contextmanager
def woken_by_signals() -> Iterator[tuple[int, int]]:
    """Yield both ends of a pipe into which the number of every signal with a handler is written."""
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    woken = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    try:
        yield readable, writable
    finally:
        signal.set_wakeup_fd(woken)
        os.close(readable)
        os.close(writable)


@contextmanager
def handled(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Have these signals call `handler` meanwhile."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def handled_to_the_end(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have SIGTERM, SIGINT and SIGUSR1 call `handler`, and ignore them from then on.

    What comes later is the end of the process, whose exit code says what happened. A launcher that
    saw another worker end signals this one just then, and Python gives its handlers back to the
    system while it ends, though not those that ignore: 143 would become -15.
    """
    for number in SIGNALS:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def leaving_at_once(tell: Callable[[Drained], None]) -> Iterator[None]:
    """Take the same signals as a wish to end the process now, where nothing has been done yet.

    Nothing is raised: an import may swallow it and go on, or abort on it where C++ is on the stack.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        drained = Drained(f"{name} before the start: there is nothing to save")
        try:
            tell(drained)
        finally:
            os._exit(drained.exit_code)

    with handled(SIGNALS, leave):
        yield
