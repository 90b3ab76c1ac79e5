"""The world of one generation: rank, world size, device, process group, and texts told around."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

from fmnist_dist import limits
from fmnist_dist.distributed.process import open_sockets
from fmnist_dist.distributed.roster import Roster
from fmnist_dist.distributed.watched import WatchedStore
from fmnist_dist.errors import PeerLostError, UsageError

_GLOO_TRIES = 5  # to connect to a peer, each for the whole time-out (torch 2.14.1)
# With gloo, older torch (2.6 and 2.7 were tried) differs in two ways that would cost much:
# - The end of a group waits for its threads with Python's lock held, which they need to let go of
#   tensors. After a collective that has failed it would wait for ever. So groups stay: some idle
#   threads and closed connections for each heal.
# - The time-out that a group was built with stays that of its collectives. So it is the long one.
_IS_OLD = TorchVersion(torch.__version__) < "2.14"
_ended: list[dist.ProcessGroup] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Where this process runs, in one generation of the process group."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store
    _check: Callable[[], None] = lambda: None
    _sockets: set[int] = field(default_factory=set)  # inodes of the group's own connections

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def tell(self, key: str, value: str) -> None:
        """Leave a text for the other ranks (`hear`); each key is told once per generation."""
        self.store.set(key, value)

    def hear(self, key: str) -> str:
        """Return what some rank told under `key`, waiting for it. Raises `PeerLostError`."""
        self.store.wait([key], timedelta(seconds=limits.TOLD_SECONDS))
        text = self.store.get(key).decode()
        self.store.add(f"heard/{key}", 1)
        return text

    def await_heard(self, key: str) -> None:
        """Wait until all other ranks have heard `key`, a few seconds at most.

        Who tells why it leaves does so first: the others would not know why.
        """
        deadline = time.monotonic() + limits.FAREWELL_SECONDS
        while self.store.add(f"heard/{key}", 0) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(limits.LAZY_POLL_SECONDS)

    def check_peers(self) -> None:
        """Raise `PeerLostError` where this generation is over."""
        self._check()

    def break_off(self) -> None:
        """Fail every collective under way, from any thread, by closing the group's connections.

        gloo waits in C++ until its time-out and `abort` does not wake it (torch 2.14.1). Its peers
        are told in the same way. It opens all its connections while the group is built; others (an
        object store's) stay.
        """
        if self.device.type == "cuda":  # not run here: no GPU
            dist.distributed_c10d._get_default_group().abort()  # noqa: SLF001
        for descriptor, inode in open_sockets().items():
            if inode in self._sockets:
                # Closed meanwhile, or the listening one, without which gloo aborts.
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as own:
                    own.getpeername()
                    if os.fstat(own.fileno()).st_ino == inode:  # else it is somebody else's now
                        own.shutdown(socket.SHUT_RDWR)


@contextmanager
def join(
    roster: Roster,
    store: dist.Store,
    *,
    device: torch.device,
    generation: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Iterator[World]:
    """Build the process group of a generation, whose ranks have all arrived; leave it at the end.

    `check` is called while this rank waits for another one; it raises when the wait is in vain.
    Raises `PeerLostError` where a peer is lost meanwhile.
    """
    before = set(open_sockets().values())
    watched = WatchedStore(dist.PrefixStore(f"group/{generation}", store), check)
    backend = "nccl" if device.type == "cuda" else "gloo"
    tries = _GLOO_TRIES if backend == "gloo" else 1
    is_old_gloo = _IS_OLD and backend == "gloo"
    seconds = limits.COLLECTIVE_SECONDS if is_old_gloo else limits.BUILD_SECONDS / tries
    try:
        with naming_lost_peers():
            dist.init_process_group(
                backend,
                store=watched if roster.size > 1 else dist.HashStore(),
                rank=roster.rank,
                world_size=roster.size,
                timeout=timedelta(seconds=seconds),
            )
            _limit_collectives(limits.COLLECTIVE_SECONDS)
        yield World(
            rank=roster.rank,
            size=roster.size,
            device=device,
            store=watched,
            _check=check,
            _sockets=set(open_sockets().values()) - before,
        )
    finally:
        if dist.is_initialized():
            if is_old_gloo:
                _ended.extend(dist.distributed_c10d._world.pg_map)  # noqa: SLF001 - also a step's second
            dist.destroy_process_group()
        else:
            # torch numbers a process's groups, whose ranks look for each other under that number.
            # One that could not be built keeps its own (2.14.1): the next would never be found.
            dist.distributed_c10d._world.group_count = 0  # noqa: SLF001


@contextmanager
def alone(device: torch.device) -> Iterator[World]:
    """Be a world of one."""
    roster = Roster.alone()
    with join(roster, roster.connect(), device=device) as joined:
        yield joined


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Turn what a collective raises when another rank has gone into a `PeerLostError`.

    NCCL raises `DistError`; gloo a bare RuntimeError that only its text tells from a bug. Where one
    collective has timed out, those beside it say "pair closure", and not where.
    """
    try:
        yield
    except dist.DistError as error:
        raise PeerLostError(f"another rank is gone: {error}") from error
    except RuntimeError as error:
        is_gloos = "gloo" in str(error).lower()
        if not is_gloos and not any(word in str(error) for word in ("Connection", "pair closure")):
            raise
        # A place in brackets, what happened, and sentences of general advice; in a callback, more.
        text = str(error).splitlines()[0].rpartition("RuntimeError: ")[2]
        reason = (text.partition("] ")[2] or text).split(". ")[0]
        raise PeerLostError(f"another rank is gone ({reason})") from error


def _limit_collectives(seconds: float) -> None:
    """Set how long a collective may take; while the group is built it is far less."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # noqa: SLF001
    set_timeout(timedelta(seconds=seconds), dist.group.WORLD)


def device_of(name: str, *, local_rank: int) -> torch.device:
    """Return the device that `--device` names. Not before the fork: CUDA must not cross one.

    Raises `UsageError` where there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    device = torch.device("cuda", local_rank)  # not run here: no GPU
    torch.cuda.set_device(device)
    return device
