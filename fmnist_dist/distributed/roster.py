"""The roll call: a worker's place in its launch, and a store that all its living ranks share.

The keepers answer it once per rendezvous; what comes out is plain data and crosses forks, so every
trainer opens a connection of its own. The launcher's store outlives attempts and remembers what
dead ones wrote: nothing is read from it but under the roll call's fresh nonce (see `meeting`).
"""

import os
import secrets
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch.distributed as dist

from fmnist_dist import limits
from fmnist_dist.distributed.connection import Connection
from fmnist_dist.distributed.meeting import host_meeting, join_meeting, names_at
from fmnist_dist.distributed.process import stat_fields

# Names the launch where what has started the agents outlives them: a Kubernetes Job, whose pods
# come and go.
OWNER_VARIABLE = "FMNIST_DIST_OWNER"
_SHARED = "fmnist_dist"  # prefix of our keys in the launcher's store


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """Where this process stands, under a nonce that no other roll call shares.

    `agents` names what has launched the ranks, in their order, each once: an agent outlives
    attempts, so a launch is known by any of them; or all have the one name of `OWNER_VARIABLE`.
    `address` is None in a world of one that nobody launched.
    """

    rank: int
    size: int
    local_rank: int
    agents: tuple[str, ...]
    nonce: str
    prefix: str
    address: tuple[str, int] | None

    @staticmethod
    def alone() -> "Roster":
        """Return the place of a world of one that nobody launched."""
        return Roster(
            rank=0,
            size=1,
            local_rank=0,
            agents=(secrets.token_hex(8),),
            nonce=secrets.token_hex(8),
            prefix=_SHARED,
            address=None,
        )

    def connect(self) -> dist.Store:
        """Open a connection that this process alone uses. Raises `TransientError`."""
        if self.address is None:
            return dist.HashStore()
        return Connection(*self.address, prefix=f"{self.prefix}/{self.nonce}")


def call_roll(environ: Mapping[str, str], *, fork: Callable[[Callable[[], int]], int]) -> Roster:
    """Meet the other ranks of this launch. Raises `TransientError` when they do not come.

    `fork` runs a function in a child process: where the launcher has no store to share, rank 0
    starts one there, so that no thread of it lives in a process that forks.
    """
    rank = int(environ.get("RANK", "0"))
    size = int(environ.get("WORLD_SIZE", "1"))
    local_rank = int(environ.get("LOCAL_RANK", "0"))
    run_id = environ.get("TORCHELASTIC_RUN_ID", "none")
    prefix = f"{_SHARED}/{run_id}"
    if "MASTER_ADDR" not in environ:
        return Roster.alone()
    from_agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    if rank == 0 and not from_agent:
        fork(lambda: _serve_store(address[1]))
    store = Connection(*address, prefix=prefix)
    keys = StoreKeys(store)
    name = environ.get(OWNER_VARIABLE) or f"{run_id}-{_parent_identity()}"
    limit = limits.ROLL_CALL_SECONDS
    if rank == 0:
        nonce = host_meeting(keys, world_size=size, limit_seconds=limit, name=name)
    else:
        nonce = join_meeting(keys, rank=rank, limit_seconds=limit, name=name)
    return Roster(
        rank=rank,
        size=size,
        local_rank=local_rank,
        agents=tuple(dict.fromkeys(names_at(keys, nonce))),
        nonce=nonce,
        prefix=prefix,
        address=address,
    )


class StoreKeys:
    """`meeting.KeyValue` and `generation.KeyValue` on a torch store: nothing here waits."""

    def __init__(self, store: dist.Store) -> None:
        self._store: Any = store

    def get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def check(self, keys: list[str]) -> bool:
        return bool(self._store.check(keys))

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        return str(self._store.compare_set(key, expected, desired).decode())

    def delete(self, key: str) -> None:
        self._store.delete_key(key)


def _serve_store(port: int) -> NoReturn:
    """Be the store of a launcher that has none to share, until the parent dies."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # ranks that drain still need it
    server = dist.TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)  # noqa: S104
    while True:
        signal.pause()
        assert server


def _parent_identity() -> str:
    """Name the launcher on this host: its process id and the tick at which it started."""
    parent = os.getppid()
    try:
        started = stat_fields(parent)[19]
    except OSError:  # not Linux
        started = "unknown"
    return f"{socket.gethostname()}-{parent}-{started}"
