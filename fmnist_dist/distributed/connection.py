"""A connection to the launcher's store on which no call waits without limit.

torch sets none for calls that are answered at once where there is a store (2.14.1): with the
store's host cut off, one took over three minutes. After a limit the connection is used no more: an
answer that comes late would be taken for that of the next call.
"""

import os
import socket
import struct
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import ParamSpec, TypeVar

import torch.distributed as dist

from fmnist_dist import limits
from fmnist_dist.distributed.process import open_sockets
from fmnist_dist.errors import TransientError

_P = ParamSpec("_P")
_R = TypeVar("_R")

_opening = threading.Lock()  # whose sockets are new is seen by what was there before


class StoreLostError(TransientError):
    """The launcher's store does not answer any more: its host is gone, and with it the launch."""


class Connection(dist.Store):
    """A `TCPStore` client, for one thread. Every call raises `StoreLostError` once one has failed.

    It does not wait for keys: that is what `check` in a loop is for (`watched`, `generation`). Keys
    stand under `prefix`; a `PrefixStore` around it would not keep this object alive.
    """

    def __init__(self, host: str, port: int, *, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix
        self._lost: StoreLostError | None = None
        with _opening:
            before = open_sockets()
            try:
                self._store = dist.TCPStore(
                    host, port, is_master=False, timeout=timedelta(seconds=limits.STORE_SECONDS)
                )
            except RuntimeError as error:  # `DistError` is one, and old torch raises it bare
                raise TransientError(
                    f"the launcher's store at {host}:{port} did not answer in "
                    f"{limits.STORE_SECONDS:g} s: {error}"
                ) from error
            for descriptor in open_sockets().keys() - before.keys():
                _limit_answers(descriptor)

    def set(self, key: str, value: str) -> None:
        self._call(self._store.set, self._under(key), value)

    def get(self, key: str) -> bytes:
        """Return the value of a key that is there."""
        return self._call(self._store.get, self._under(key))

    def add(self, key: str, value: int) -> int:
        return self._call(self._store.add, self._under(key), value)

    def check(self, keys: list[str]) -> bool:
        return self._call(self._store.check, [self._under(key) for key in keys])

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._call(self._store.compare_set, self._under(key), expected, desired)

    def delete_key(self, key: str) -> bool:
        return self._call(self._store.delete_key, self._under(key))

    def num_keys(self) -> int:
        return self._call(self._store.num_keys)

    def _under(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _call(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if self._lost is not None:
            raise self._lost
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            what = str(error).splitlines()[0]
            self._lost = StoreLostError(f"the launcher's store is gone ({what})")
            raise self._lost from error


def _limit_answers(descriptor: int) -> None:
    """Set how long a blocking call on a socket may take."""
    whole, part = divmod(limits.ANSWER_SECONDS, 1)
    seconds = struct.pack("@ll", int(whole), int(part * 1e6))  # struct timeval
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
