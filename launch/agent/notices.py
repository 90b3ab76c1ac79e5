"""The signals that the agent got: heard from before torch is imported until the very end.

Python runs their handlers on the main thread, which for that reason never waits for anything but
time (see `aside`). As PID 1 a process has no default actions: a signal without a handler is lost.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable
from types import FrameType

from fmnist_dist.errors import ExitCode

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


class Notices:
    """What is asked of the agent: to stop."""

    def __init__(self) -> None:
        self._come: deque[signal.Signals] = deque()
        self._has_workers = False
        self._tell: Callable[[signal.Signals], None] | None = None
        self.count = 0
        self.hear(SIGNALS)

    def hear(self, numbers: Iterable[signal.Signals]) -> None:
        """Take these signals as notices, but those that whoever started this has ignored: nohup."""
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        notice = signal.Signals(number)
        if self._has_workers:
            self._come.append(notice)
            return
        # Nothing is raised: an import may swallow it and go on, or abort where C++ is on the stack.
        try:
            if self._tell is not None:
                self._tell(notice)
        finally:
            os._exit(ExitCode.DRAINED)

    def tell_before_leaving(self, tell: Callable[[signal.Signals], None]) -> None:
        """Until `keep`, a notice ends the process with 143, and this is done before."""
        self._tell = tell

    def keep(self) -> None:
        """Keep notices for `take` from now on: there are workers to think of."""
        self._has_workers = True

    @property
    def are_waiting(self) -> bool:
        """Whether there is one to take."""
        return bool(self._come)

    def take(self) -> signal.Signals | None:
        """Return the oldest notice that was not taken yet; None for none."""
        return self._come.popleft() if self._come else None
