"""Sending one rank's bytes to all ranks, and finding out whether all hold the same state."""

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist

from fmnist_dist.distributed.transfer import adopt, digest_of
from fmnist_dist.distributed.world import World
from fmnist_dist.errors import TransientError
from fmnist_dist.tensorfile import as_tensor


class DifferentStatesError(TransientError):
    """The ranks do not hold the same state: somebody's memory or processor is faulty."""


def broadcast(
    world: World,
    data: bytes | memoryview | None,
    *,
    source: int,
    key: str,
    digest: str | None = None,
) -> bytes | memoryview:
    """Return the bytes of rank `source` on every rank; the other ranks pass None.

    `key` is used once in a generation. The source may know the SHA-256 of its bytes. Nothing is
    copied on the source, and received once on the others (on a GPU once more; not run here). Raises
    `TornStateError`, and what a collective raises.
    """
    if world.size == 1:
        assert data is not None
        return data
    if data is not None:
        world.tell(f"transfer/{key}", json.dumps([len(data), digest or digest_of(data)]))
        if len(data):
            dist.broadcast(as_tensor(data).to(world.device), src=source)
        return data
    size, told = json.loads(world.hear(f"transfer/{key}"))
    received = torch.empty(size, dtype=torch.uint8, device=world.device)
    if size:
        dist.broadcast(received, src=source)
    return adopt(received.cpu().numpy().data, digest=told)


def require_equal(world: World, digest: str, *, step: int) -> None:
    """Compare a state's digest, SHA-256 as hex, over all ranks.

    Raises `DifferentStatesError`.
    """
    if world.size == 1:
        return
    own = as_tensor(bytes.fromhex(digest)).to(world.device)
    all_of_them = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(all_of_them, own)
    digests = [bytes(each.tolist()).hex() for each in all_of_them]
    refuse_different(dict(enumerate(digests)), step=step)


def refuse_different(digests: Mapping[int, str], *, step: int) -> None:
    """Raise `DifferentStatesError` unless all ranks, the keys, hold the same state."""
    found = list(digests.values())
    if len(set(found)) == 1:
        return
    most = max(found, key=found.count)
    others = [rank for rank, each in digests.items() if each != most]
    raise DifferentStatesError(
        f"the ranks hold different states after step {step} (rank "
        f"{', '.join(map(str, others))} unlike the others): memory or a processor there is faulty; "
        "nothing of it is saved, a restart goes on from the newest checkpoint"
    )
