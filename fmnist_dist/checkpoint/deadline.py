"""The limit that whoever needs something durable brings along, for all storage asks meanwhile.

A drain has seconds, one operation on object storage may take a minute: inside `within` it takes no
longer than is left. Local disks are not held to it: a system call that hangs cannot be ended.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Hold what this thread asks of storage to so many seconds, and to any earlier deadline."""
    token = _deadline.set(min(_deadline.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _deadline.reset(token)


def deadline() -> float:
    """Return the moment (of `time.monotonic`) by which an operation is to have ended."""
    return _deadline.get()
