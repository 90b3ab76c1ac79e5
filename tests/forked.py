"""Real children by fork: run to their end, or watched while they run, then killed and reaped."""

import faulthandler
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def fork(function: Callable[[], object]) -> int:
    """Return the pid of a child that runs `function` and exits with 0, or with 1 if it raises."""
    with warnings.catch_warnings():
        # Python 3.12 warns because of pytest-timeout's thread; it holds no lock that children need.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    code = 1
    faulthandler.disable()  # pytest's would report the crashes that tests ask for
    try:
        function()
        code = 0
    except BaseException:  # noqa: BLE001 - nothing of pytest may run in the child
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def status_of(function: Callable[[], object]) -> int:
    """Run `function` in a child; return its wait status."""
    return os.waitpid(fork(function), 0)[1]


@contextmanager
def running_child(function: Callable[[], object]) -> Iterator[int]:
    """Give the pid of a child that runs `function`; SIGKILL and reap it in the end."""
    pid = fork(function)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
