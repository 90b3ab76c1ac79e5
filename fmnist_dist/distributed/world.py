"""The world of one launch: rank, world size, device, process group, and who owns the launch."""

import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fmnist_dist.distributed.meeting import POLL_SECONDS, Invitation, host_meeting, join_meeting
from fmnist_dist.errors import TransientError, UsageError

MEETING_SECONDS = 120.0  # a node may still be importing torch from a cold disk
FAREWELL_SECONDS = 5.0
_SHARED = "fmnist_dist"  # prefix of our keys in the launcher's store


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Where this process runs. `owner` names the launch, alike for all its ranks and restarts."""

    rank: int
    size: int
    device: torch.device
    owner: str
    store: dist.Store

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def tell(self, key: str, value: str) -> None:
        """Leave a text for the other ranks (`hear`); each key is told once per attempt."""
        self.store.set(key, value)

    def hear(self, key: str) -> str:
        """Return what rank 0 told under `key`, waiting for it. Raises `TransientError`."""
        try:
            text = self.store.get(key).decode()
            self.store.add(f"heard/{key}", 1)
        except dist.DistError as error:
            raise TransientError(f"rank 0 did not tell {key!r} in time: {error}") from error
        return text

    def await_heard(self, key: str) -> None:
        """Wait until all other ranks have heard `key`, a few seconds at most.

        Rank 0 does so before it leaves: its store leaves with it, and they would not know why.
        """
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self.store.add(f"heard/{key}", 0) < self.size - 1:
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)


@contextmanager
def join(environ: Mapping[str, str], *, device: str, step_timeout: float) -> Iterator[World]:
    """Meet the other ranks and build the process group; torn down on the way out.

    Without a launcher's variables it is a world of one. `step_timeout` (seconds) limits every
    collective. Raises `TransientError` when the others do not come.
    """
    rank = int(environ.get("RANK", "0"))
    size = int(environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, local_rank=int(environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=step_timeout)
    try:
        if "MASTER_ADDR" in environ:
            owner, store = _meet(environ, rank=rank, size=size)
        else:
            owner, store = secrets.token_hex(8), dist.HashStore()
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    except dist.DistError as error:
        raise TransientError(f"the ranks could not meet: {error}") from error
    store.set_timeout(timeout)
    try:
        yield World(rank=rank, size=size, device=chosen, owner=owner, store=store)
    finally:
        dist.destroy_process_group()


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Turn what a collective raises when another rank has gone into a `TransientError`.

    NCCL raises `DistError`; gloo a bare RuntimeError that only its text tells from a bug.
    """
    try:
        yield
    except dist.DistError as error:
        raise TransientError(f"another rank is gone: {error}") from error
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        # A place in brackets, what happened, and sentences of general advice.
        text = str(error).splitlines()[0]
        reason = (text.partition("] ")[2] or text).split(". ")[0]
        raise TransientError(
            f"another rank is gone ({reason}): this one ends too, so that all can start again"
        ) from error


def _device(name: str, *, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    device = torch.device("cuda", local_rank)  # not run here: no GPU
    torch.cuda.set_device(device)
    return device


def _meet(environ: Mapping[str, str], *, rank: int, size: int) -> tuple[str, dist.Store]:
    """Return the launch's owner and a store that only the living ranks of this attempt use."""
    from_agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    launcher = dist.TCPStore(
        address,
        port,
        is_master=rank == 0 and not from_agent,
        timeout=timedelta(seconds=MEETING_SECONDS),
    )
    run_id = environ.get("TORCHELASTIC_RUN_ID", "none")
    keys = dist.PrefixStore(f"{_SHARED}/{run_id}", launcher)
    if from_agent:
        # The launcher's store lives as long as the launch: what stands there first, stays.
        owner = keys.compare_set("owner", "", secrets.token_hex(8)).decode()
    else:
        owner = f"{run_id}-{_parent_identity()}"
    if rank != 0:
        invitation = join_meeting(_Keys(keys), rank=rank, limit_seconds=MEETING_SECONDS)
        return owner, _own_store(invitation)
    own = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)  # noqa: S104
    invitation = host_meeting(
        _Keys(keys),
        world_size=size,
        host=_address_towards(address, port),
        port=own.port,
        limit_seconds=MEETING_SECONDS,
    )
    return owner, dist.PrefixStore(invitation.nonce, own)


def _own_store(invitation: Invitation) -> dist.Store:
    store = dist.TCPStore(
        invitation.host,
        invitation.port,
        is_master=False,
        timeout=timedelta(seconds=MEETING_SECONDS),
    )
    return dist.PrefixStore(invitation.nonce, store)


class _Keys:
    """`meeting.KeyValue` on a torch store."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)


def _address_towards(address: str, port: int) -> str:
    """Return this host's address on the network on which the others reach the launcher's store."""
    family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # a datagram socket: sends nothing
        return str(probe.getsockname()[0])


def _parent_identity() -> str:
    """Name the launcher on this host: its process id and the tick at which it started."""
    parent = os.getppid()
    stat = Path(f"/proc/{parent}/stat")
    started = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else "unknown"
    return f"{socket.gethostname()}-{parent}-{started}"
