"""Sending rank 0's bytes to all ranks."""

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist

from fmnist_dist.distributed.world import World


def share_files(world: World, files: Mapping[str, bytes] | None) -> dict[str, bytes]:
    """Return rank 0's `files` on every rank; the other ranks pass None.

    One rank reads and verifies, and none can take a newer or older state than the others.
    """
    if world.size == 1:
        return dict(files or {})
    if world.is_main:
        assert files is not None
        world.tell("files", json.dumps({name: len(data) for name, data in files.items()}))
        message = torch.frombuffer(bytearray(b"".join(files.values())), dtype=torch.uint8)
        dist.broadcast(message.to(world.device), src=0)
        return dict(files)
    sizes: dict[str, int] = json.loads(world.hear("files"))
    message = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=world.device)
    dist.broadcast(message, src=0)
    data = message.cpu().numpy().tobytes()
    shared, start = {}, 0
    for name, size in sizes.items():
        shared[name] = data[start : start + size]
        start += size
    return shared
