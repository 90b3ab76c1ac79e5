"""What may never come back is asked on a thread that can be left behind.

A call of torch's store has no limit once its host is cut off, and no signal handler runs while the
main thread is in it. The main thread waits for nothing but time.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def aside(function: Callable[[], T], *, name: str) -> "Future[T]":
    """Run `function` on a thread of its own, which does not keep the process from ending."""
    future: Future[T] = Future()

    def act() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - a thread's entry: raised by `result`
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=act, name=name, daemon=True).start()
    return future
