"""Adding gradients, buffers and counts over all shards: the same bits at any world size.

`GradientTree` is a DDP communication hook. All backward passes of a rank but the last run under
`no_sync()`; their gradients are pushed by hand. The last one runs through DDP, whose buckets arrive
here while it still computes, so communication overlaps with it as in plain DDP.

Traps (torch 2.14.1): DDP rebuilds its buckets after the first step, so nothing about them is kept;
`GradBucket.gradients()` of a channels_last parameter is not laid out like `p.grad`, so both sides
are read as flat memory.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmnist_dist import limits
from fmnist_dist.distributed.tree import Carry, Node, combine, owned
from fmnist_dist.plan import shards_of_rank

# torch 2.14 renamed it; the old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_GATHER_UP_TO = 4  # above this world size an all-gather of whole partial sums moves too much


class Layout:
    """Which tree nodes each rank owns; every rank sends as many rows as the richest one has."""

    def __init__(self, *, world_size: int, logical_shards: int) -> None:
        self.leaves = logical_shards
        self.world_size = world_size
        self.nodes: list[list[Node]] = []
        for rank in range(world_size):
            shards = shards_of_rank(rank, world_size=world_size, logical_shards=logical_shards)
            self.nodes.append(owned(shards, leaves=logical_shards))
        self.rows = max(len(nodes) for nodes in self.nodes)

    def combine(self, gathered: Tensor) -> Tensor:
        """Add [world_size, rows, n] partial sums to [n], in the one tree."""
        values = {
            node: gathered[rank, row]
            for rank, nodes in enumerate(self.nodes)
            for row, node in enumerate(nodes)
        }
        return combine(values, leaves=self.leaves, add=torch.add)

    def pack(self, values: Sequence[Tensor]) -> Tensor:
        """Stack this rank's node values, each [n], to [rows, n]."""
        if len(values) == self.rows == 1:
            return values[0].unsqueeze(0)
        missing = [torch.zeros_like(values[0])] * (self.rows - len(values))
        return torch.stack([*values, *missing])


class GradientTree:
    """The communication hook, and the partial sums of the shards before the last."""

    def __init__(self, parameters: Sequence[nn.Parameter], layout: Layout) -> None:
        self._layout = layout
        self._parameters = list(parameters)
        self._partial: dict[Tensor, list[Tensor]] = {}
        self._nodes: list[Node] = []
        self._last = 0
        # Above `_GATHER_UP_TO` a bucket takes two collectives. The second has its own group (each
        # group must see the same order on all ranks) and thread (gloo's own must not wait).
        self._second: Any = None
        if layout.world_size > _GATHER_UP_TO:
            self._second = dist.new_group(timeout=timedelta(seconds=limits.COLLECTIVE_SECONDS))
        self._thread = ThreadPoolExecutor(1, "reduce") if self._second else None

    def begin(self, shards: Sequence[int]) -> None:
        self._carry: Carry[list[Tensor]] = Carry(leaves=self._layout.leaves, add=_add_lists)
        self._last = shards[-1]

    def push(self, shard: int) -> None:
        """Take the gradients that a backward pass under `no_sync()` left in the parameters."""
        gradients = []
        for parameter in self._parameters:
            assert parameter.grad is not None, "every trainable parameter must take part"
            assert parameter.grad.stride() == parameter.stride(), "a gradient in another layout"
            gradients.append(_memory(parameter.grad))
            parameter.grad = None
        self._carry.push(shard, gradients)

    def ready(self) -> None:
        """Say that the next backward pass is the last shard's, through DDP."""
        self._nodes = [node for node, _ in self._carry.nodes]
        self._partial = {
            parameter: [values[position] for _, values in self._carry.nodes]
            for position, parameter in enumerate(self._parameters)
        }

    def hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Return the future sum of a bucket over all shards; runs on autograd's thread."""
        carry: Carry[Tensor] = Carry(leaves=self._layout.leaves, add=torch.add)
        parts = [self._partial[parameter] for parameter in bucket.parameters()]
        carry.nodes = [
            (node, torch.cat([values[row] for values in parts]))
            for row, node in enumerate(self._nodes)
        ]
        carry.push(self._last, bucket.buffer())
        rows = self._layout.pack([value for _, value in carry.nodes])
        if self._layout.world_size == 1:
            return _done(rows[0])
        if self._thread is None:
            return self._gather(rows)
        return self._scatter(rows)

    def close(self) -> None:
        if self._thread is not None:
            # It may wait for a peer that never answers: the group's end ends that.
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _gather(self, rows: Tensor) -> torch.futures.Future[Tensor]:
        """All ranks get all partial sums and add them alike: one collective."""
        world_size = self._layout.world_size
        gathered = rows.new_empty(world_size * rows.numel())
        work = _all_gather(gathered, rows.flatten(), async_op=True)
        assert work is not None

        def add(done: torch.futures.Future[object]) -> Tensor:
            done.value()  # raises what the collective raised: `then` runs after a failure as well
            return self._layout.combine(gathered.view(world_size, *rows.shape))

        return work.get_future().then(add)

    def _scatter(self, rows: Tensor) -> torch.futures.Future[Tensor]:
        """Each rank adds one slice and gives it to all: the traffic of a ring all-reduce."""
        size, world = rows.shape[1], self._layout.world_size
        slice_size = -(-size // world)
        padded = nn.functional.pad(rows, (0, slice_size * world - size))
        # [rows, world, slice] -> [world, rows, slice]: what each rank is to add lies together.
        sent = padded.view(len(rows), world, slice_size).transpose(0, 1).contiguous()
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, async_op=True)
        assert work is not None
        future = _future(rows.device)

        def finish() -> None:
            try:
                work.wait()
                own = self._layout.combine(received)
                result = own.new_empty(world * slice_size)
                _all_gather(result, own, group=self._second)
                future.set_result(result[:size])
            except BaseException as error:  # noqa: BLE001 - handed to the waiting step
                future.set_exception(error)  # type: ignore[arg-type]

        assert self._thread is not None
        self._thread.submit(finish)
        return future


class StepSums:
    """What a step adds up besides gradients, in one small collective beside the backward pass.

    Floats (loss, buffers) are added in the tree; integers (counts, ledger digests) have no order,
    and wrap.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def start(self, floats: Carry[Tensor], integers: Tensor) -> "PendingSums":
        """Send this rank's node values, each float32 [f], and its int64 [i]; returns at once."""
        rows = self._layout.pack([value for _, value in floats.nodes])
        # Integers first: eight-byte views must begin at a multiple of eight.
        message = torch.cat([integers.view(torch.uint8), rows.flatten().view(torch.uint8)])
        if self._layout.world_size == 1:
            return PendingSums(self._layout, message.unsqueeze(0), rows.shape, None)
        gathered = message.new_empty(self._layout.world_size * len(message))
        work = _all_gather(gathered, message, async_op=True)
        return PendingSums(self._layout, gathered.view(-1, len(message)), rows.shape, work)


class PendingSums:
    """A collective under way."""

    def __init__(
        self, layout: Layout, gathered: Tensor, shape: torch.Size, work: dist.Work | None
    ) -> None:
        self._layout = layout
        self._gathered = gathered
        self._shape = shape
        self._work = work

    def wait(self) -> tuple[Tensor, Tensor]:
        """Return the sums: float32 [f] and int64 [i]."""
        if self._work is not None:
            self._work.wait()
        split = self._gathered.shape[1] - self._shape.numel() * 4
        integers = self._gathered[:, :split].flatten().view(torch.int64)
        floats = self._gathered[:, split:].flatten().view(torch.float32)
        world_size = len(self._gathered)
        total = self._layout.combine(floats.view(world_size, *self._shape))
        return total, integers.view(world_size, -1).sum(dim=0)


def _memory(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _add_lists(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(left, right)
    return left


def _done(value: Tensor) -> torch.futures.Future[Tensor]:
    future = _future(value.device)
    future.set_result(value)
    return future


def _future(device: torch.device) -> torch.futures.Future[Tensor]:
    """Return an open future; on CUDA (not run here) it also synchronises streams."""
    return torch.futures.Future(devices=[device] if device.type == "cuda" else None)
