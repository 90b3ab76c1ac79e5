"""Sending one rank's bytes to all ranks, and finding out whether all hold the same state."""

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist

from fmnist_dist.distributed.transfer import adopt, digest_of
from fmnist_dist.distributed.world import World
from fmnist_dist.errors import TransientError


class DifferentStatesError(TransientError):
    """The ranks do not hold the same state: somebody's memory or processor is faulty."""


def broadcast(world: World, data: bytes | None, *, source: int, key: str) -> bytes:
    """Return the bytes of rank `source` on every rank; the other ranks pass None.

    `key` is used once in a generation. Raises `TornStateError`, and what a collective raises.
    """
    if world.size == 1:
        assert data is not None
        return data
    if data is not None:
        world.tell(f"transfer/{key}", json.dumps([len(data), digest_of(data)]))
        dist.broadcast(_tensor(data).to(world.device), src=source)
        return data
    size, digest = json.loads(world.hear(f"transfer/{key}"))
    received = torch.empty(size, dtype=torch.uint8, device=world.device)
    dist.broadcast(received, src=source)
    return adopt(received.cpu().numpy().tobytes(), digest=digest)


def require_equal(world: World, digest: str, *, step: int) -> None:
    """Compare a state's digest, SHA-256 as hex, over all ranks.

    Raises `DifferentStatesError`.
    """
    if world.size == 1:
        return
    own = _tensor(bytes.fromhex(digest)).to(world.device)
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


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return named bytes as one message."""
    header = json.dumps({name: len(data) for name, data in files.items()}).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *files.values()])


def unpack(message: bytes) -> dict[str, bytes]:
    """Return what `pack` packed."""
    start = 8 + int.from_bytes(message[:8], "little")
    files: dict[str, bytes] = {}
    for name, size in json.loads(message[8:start]).items():
        files[name] = message[start : start + size]
        start += size
    return files


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
