"""Forking a child of the keeper, and what must not cross: signals, sockets, unflushed output.

The keeper has one thread, so no lock can be held by a thread that the child lacks. The fork happens
on that thread, which outlives the child: the parent-death signal follows the thread.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable

from fmnist_dist import limits
from fmnist_dist.distributed.process import die_with, name_process, open_sockets
from fmnist_dist.errors import ExitCode, TransientError

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)
_STDERR = 2


class NoRoomError(TransientError):
    """The system has no room for another process: too many, or too little memory."""


def is_supported() -> bool:
    """Whether this system has forks, and signals at a parent's death."""
    return sys.platform == "linux"


def fork(function: Callable[[], int], *, name: str, close: Iterable[int] = ()) -> int:
    """Run `function` in a child, whose exit code it returns; return the child's process id.

    The child has a process group of its own, dies with this process, and is called `name`. It has
    none of this process's sockets, nor the descriptors `close`. Raises `NoRoomError`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    # Until the child has its own handlers, a signal to it must not run those of the keeper.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    try:
        child = os.fork()
    except OSError as error:  # this process goes on as it was
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise NoRoomError(f"no room for another process: {error.strerror}") from error
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return child
    code: int = ExitCode.BUG
    try:
        os.setpgid(0, 0)
        die_with(parent)
        _begin_anew(close)
        name_process(name)  # last: whoever finds it by its name finds it apart
        code = function()
    except SystemExit as leaving:
        code = _code_of(leaving)
    except BaseException:  # noqa: BLE001 - told here, and by the exit code: nobody else can
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            # Not `sys.exit`: what the keeper has opened is not this process's to close.
            os._exit(code)


def end_of(child: int, deadline: float) -> int | None:
    """Return a child's wait status when it has ended, None if it has not by the deadline."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(limits.LAZY_POLL_SECONDS)


def _code_of(leaving: SystemExit) -> int:
    """Return what the interpreter would end with; a text is told, as it would be there."""
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or ExitCode.FINISHED
    print(leaving.code, file=sys.stderr)  # noqa: T201 - to the place where tracebacks go
    return ExitCode.BUG


def _begin_anew(close: Iterable[int]) -> None:
    signal.set_wakeup_fd(-1)
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor in close:
        os.close(descriptor)
    for descriptor in open_sockets():
        if descriptor > _STDERR:  # a peer of the keeper's connection would not see its death
            os.close(descriptor)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
