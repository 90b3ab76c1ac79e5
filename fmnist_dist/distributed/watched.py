"""A store whose waits end when they are in vain: what a process group is built over.

While a group is built every rank waits for what the others write. With a plain store, a rank that
dies between its arrival and the group costs the others the whole time-out (8 s of 8 in a trial).
"""

import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from fmnist_dist import limits
from fmnist_dist.errors import PeerLostError

_SHORTEST = timedelta(seconds=limits.BUILD_SECONDS)  # gloo asks for less: of one try to connect


class WatchedStore(dist.Store):
    """Passes everything on, and calls `check` while it waits; what that raises ends the wait."""

    def __init__(self, store: dist.Store, check: Callable[[], None]) -> None:
        super().__init__()
        self._store = store
        self._check = check
        self._timeout = timedelta(seconds=limits.TOLD_SECONDS)

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._store.get(key)

    def add(self, key: str, value: int) -> int:
        return self._store.add(key, value)

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._store.compare_set(key, expected, desired)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(key)

    def num_keys(self) -> int:
        return self._store.num_keys()

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are there. Raises `PeerLostError` after the limit."""
        limit = self._timeout if timeout is None else max(timeout, _SHORTEST)
        began = time.monotonic()
        deadline = began + limit.total_seconds()
        while not self._store.check(keys):
            self._check()
            now = time.monotonic()
            if now > deadline:
                raise PeerLostError(f"{keys[0]!r} was not told in {limit.total_seconds():g} s")
            time.sleep(limits.poll_seconds(now - began))

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    @property
    def timeout(self) -> timedelta:
        return self._timeout
