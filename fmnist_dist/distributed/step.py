"""One training step over all logical shards, up to but without the optimizer's update.

A rank computes its shards one after the other. Each begins with the step's committed buffers and
randomness keyed by (seed, step, shard), and has a size that depends on the batch alone, so its
kernels do the same work wherever it runs. What the shards add up to is one tree's sum (`tree`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from fmnist_dist import keys, plan
from fmnist_dist.distributed.reduce import GradientTree, Layout, PendingSums, StepSums
from fmnist_dist.distributed.tree import Carry
from fmnist_dist.distributed.world import World
from fmnist_dist.plan import shard_bounds, shards_of_rank
from fmnist_dist.state import Durable, StepResult, TrainState


class Samples(Protocol):
    """What a gather returns for one shard."""

    @property
    def images(self) -> Tensor: ...  # float32 [B, C, H, W]
    @property
    def labels(self) -> Tensor: ...  # int64 [B]
    @property
    def identity(self) -> Tensor: ...  # int64 [B, 2]


_PARAMETERS = signature(DistributedDataParallel).parameters
# torch 2.14 renamed the argument; the old name warns.
_RENAMED = "forward_sync_buffers" in _PARAMETERS
_NO_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if _RENAMED else "broadcast_buffers": False,
}
# All ranks hold the same state: they have compared its digest. torch 2.6 sends rank 0's even so.
_SENDS = "init_sync" not in _PARAMETERS
_NO_SYNC: dict[str, Any] = {} if _SENDS else {"init_sync": False}

Gather = Callable[[plan.Step, int, int], Samples]  # samples [start, stop) of the global batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a rank tells all others with its sums. Only rank 0 saves, and knows what is durable."""

    stop: bool = False
    save: bool = False
    differs: bool = False  # what the ranks have copied for a save
    durable: Durable | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A finished step, not yet committed, and what the ranks wish for, the same on all of them."""

    result: StepResult
    wishes: Wishes


class ShardedStep:
    """Computes steps of one state's model, with gradients summed over the world.

    A step that fails half-way leaves scratch values in the model's buffers and gradients; the next
    one, of this object or of its successor in another world, begins by clearing them.
    """

    def __init__(
        self,
        state: TrainState,
        world: World,
        *,
        logical_shards: int,
        precision: str,
        seed: int,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        layout = Layout(world_size=world.size, logical_shards=logical_shards)
        self._world = world
        self._logical_shards = logical_shards
        self._shards = shards_of_rank(
            world.rank, world_size=world.size, logical_shards=logical_shards
        )
        self._seed = seed
        self._before_waiting = before_waiting
        if _SENDS:
            before_waiting()
        self._ddp = DistributedDataParallel(
            _Loss(state.model, precision=precision, device=world.device),
            device_ids=[world.device] if world.device.type == "cuda" else None,
            **_NO_SYNC,
            **_NO_BUFFERS,  # shards begin with the committed ones, alike on every rank
        )
        self._trained = [p for p in state.model.parameters() if p.requires_grad]
        self._gradients = GradientTree(self._trained, layout)
        self._ddp.register_comm_hook(None, self._gradients.hook)
        self._sums = StepSums(layout)
        self._buffers = _Buffers(state)
        self._steps = 0

    def __call__(self, step: plan.Step, gather: Gather, *, wishes: Wishes) -> Outcome:
        """Run forward and backward of one step; gradients are left in the parameters."""
        bounds = shard_bounds(step.size, logical_shards=self._logical_shards)
        integers = torch.zeros(_INTEGERS + self._buffers.num_integers, dtype=torch.int64)
        floats: Carry[Tensor] = Carry(leaves=self._logical_shards, add=torch.add)
        for parameter in self._trained:
            parameter.grad = None
        self._buffers.begin()
        self._gradients.begin(self._shards)
        self._rebuild_buckets()
        pending: PendingSums | None = None
        for shard in self._shards:
            last = shard == self._shards[-1]
            start, stop_at = bounds[shard]
            with nullcontext() if last else self._ddp.no_sync():
                samples = gather(step, start, stop_at)
                self._seed_dropout(step.step, shard)
                loss, correct = self._ddp(
                    samples.images, samples.labels, step.settings.label_smoothing, step.size
                )
                weight = (stop_at - start) / step.size
                floats.push(shard, torch.cat([loss.detach().view(1), self._buffers.take(weight)]))
                integers[_WISHES:_INTEGERS] += torch.stack(
                    [
                        torch.tensor(stop_at - start),
                        correct.cpu(),
                        *samples.identity.sum(dim=0).cpu(),
                    ]
                )
                if shard == 0:
                    integers[_INTEGERS:] = self._buffers.integers()
                if last:
                    # Beside the backward pass: nothing of it depends on gradients.
                    integers[:_WISHES] = torch.tensor(_encode(wishes))
                    self._before_waiting()
                    pending = self._sums.start(floats, integers.to(self._world.device))
                    self._gradients.ready()
                loss.backward()
            self._buffers.restore()
            if not last:
                self._gradients.push(shard)
        assert pending is not None
        return self._outcome(*pending.wait())

    def _rebuild_buckets(self) -> None:
        """Have DDP order its buckets by the first backward pass, where one has been.

        The first forward pass after it would do so, in a collective that nobody announces: a rank
        whose peer died in there was taken for one that computes.
        """
        if self._steps == 1:
            self._before_waiting()
            self._ddp.reducer._rebuild_buckets()  # noqa: SLF001 - as DDP itself before a forward pass
        self._steps += 1

    def close(self) -> None:
        """Let go of the parameters: they outlive this group, and may go on in another one.

        Reference cycles keep a DDP wrapper alive until a collection, and its reducer would go on
        taking part in every backward pass.
        """
        self._ddp.reducer._remove_autograd_hooks()  # noqa: SLF001 - torch itself does so to re-wrap
        self._gradients.close()

    def _outcome(self, floats: Tensor, integers: Tensor) -> Outcome:
        values = integers[:_INTEGERS].tolist()
        count, correct, first, second = values[_WISHES:]
        result = StepResult(
            loss=float(floats[0]),
            correct=correct,
            count=count,
            digest=(first, second),
            buffers=self._buffers.committed(floats[1:], integers[_INTEGERS:]),
        )
        return Outcome(result=result, wishes=_decode(values[:_WISHES]))

    def _seed_dropout(self, step: int, shard: int) -> None:
        key = keys.key(keys.Stream.DROPOUT, self._seed, step, shard) >> 1
        torch.default_generator.manual_seed(key)
        if self._world.device.type == "cuda":  # not run here
            torch.cuda.manual_seed(key)


_WISHES = 7  # stop, save, differs, and what is durable: record + 1, step, epoch, evaluated
_INTEGERS = _WISHES + 4  # samples, correct, digest lanes


def _encode(wishes: Wishes) -> list[int]:
    durable = wishes.durable
    known = (
        [durable.index + 1, durable.step, durable.epoch, int(durable.evaluated)]
        if durable
        else [0] * 4
    )
    return [int(wishes.stop), int(wishes.save), int(wishes.differs), *known]


def _decode(sums: list[int]) -> Wishes:
    stop, save, differs, record, step, epoch, evaluated = sums
    durable = (
        Durable(index=record - 1, step=step, epoch=epoch, evaluated=evaluated > 0)
        if record
        else None
    )
    return Wishes(stop=stop > 0, save=save > 0, differs=differs > 0, durable=durable)


class _Loss(nn.Module):
    """The model with its loss, so that the forward pass goes through DDP as a whole."""

    def __init__(self, model: nn.Module, *, precision: str, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self._autocast = precision == "bf16"
        self._device_type = device.type

    def forward(
        self, images: Tensor, labels: Tensor, label_smoothing: float, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Return the shard's share of the global batch's mean loss, and its correct predictions."""
        if len(labels) == 0:
            # An empty shard adds zero, to every parameter, and normalises nothing.
            zero = torch.stack([p.sum() * 0.0 for p in self.parameters()]).sum()
            return zero, labels.new_zeros(())
        with torch.autocast(self._device_type, dtype=torch.bfloat16, enabled=self._autocast):
            logits = self.model(images)
        loss = cross_entropy(
            logits.float(), labels, reduction="sum", label_smoothing=label_smoothing
        )
        return loss / batch_size, (logits.argmax(dim=1) == labels).sum()


class _Buffers:
    """The model's buffers: scratch while shards run; the state's own become a weighted mean.

    The mean is taken of differences from the committed value, so that a buffer that no shard
    changes keeps its bits. Integer buffers are not averaged: they become what shard 0, which is
    never empty, left.
    """

    def __init__(self, state: TrainState) -> None:
        self._all = list(state.model.buffers())
        self._committed = state.buffers
        self._floats = [b for b in self._all if b.is_floating_point()]
        self._integers = [b for b in self._all if not b.is_floating_point()]
        self.num_integers = sum(b.numel() for b in self._integers)

    def begin(self) -> None:
        self.restore()
        self._before = _flat([b for b in self._committed if b.is_floating_point()])

    def take(self, weight: float) -> Tensor:
        """Return the shard's weighted change of the floating-point buffers, float32 [f]."""
        return (_flat(self._floats) - self._before) * weight

    def integers(self) -> Tensor:
        return _flat(self._integers).to("cpu", torch.int64)

    def restore(self) -> None:
        for buffer, committed in zip(self._all, self._committed, strict=True):
            buffer.copy_(committed)

    def committed(self, change: Tensor, integers: Tensor) -> list[Tensor]:
        """Return the new buffers, in the order of `model.buffers()`."""
        floats = iter((self._before + change).split_with_sizes([b.numel() for b in self._floats]))
        whole = iter(integers.split_with_sizes([b.numel() for b in self._integers]))
        return [
            next(floats if buffer.is_floating_point() else whole).view_as(buffer)
            for buffer in self._all
        ]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]) if tensors else torch.empty(0)
