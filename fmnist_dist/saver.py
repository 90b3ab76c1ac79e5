"""A thread that does one thing at a time beside training.

What goes wrong there waits until it is asked for, and is raised where it is asked for: nothing is
lost. The thread is started when it is first needed, which is never in a process that forks.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Saver:
    """One thread, and at most one thing that it does or has done."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        # A daemon: one that hangs in a system call for ever does not keep its process from ending.
        self._thread = threading.Thread(target=self._run, name="saver", daemon=True)

    @property
    def busy(self) -> bool:
        return not self._idle.is_set()

    def start(self, work: Callable[[], None]) -> None:
        """Have something done. It must not be busy, and what went wrong before was asked for."""
        assert not self.busy
        assert self._error is None, self._error
        if self._thread.ident is None:
            self._thread.start()
        self._idle.clear()
        self._work.put(work)

    def wait(self, seconds: float) -> bool:
        """Wait until it is not busy; return whether it is not."""
        return self._idle.wait(max(0.0, seconds))

    def error(self) -> BaseException | None:
        """Return what went wrong, once; None for nothing, or not yet."""
        if self.busy:
            if self._thread.is_alive():
                return None
            return RuntimeError("the thread that saves has died")
        error, self._error = self._error, None
        return error

    def close(self, seconds: float) -> bool:
        """Let the thread end; return whether it has, in time."""
        if self._thread.ident is None:
            return True
        self._work.put(None)
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised by whoever asks
                self._error = error
            finally:
                del work  # and with it what it holds
                self._idle.set()
