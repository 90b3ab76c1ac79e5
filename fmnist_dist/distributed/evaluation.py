"""Loss and accuracy on a whole split: the same numbers on every world size, each sample once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fmnist_dist.distributed.step import Samples
from fmnist_dist.distributed.world import World

_CHUNK = 500  # samples in one forward pass, whatever the world size: equal kernels, equal bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    loss: float  # mean cross-entropy, without label smoothing
    accuracy: float  # 0…1


@torch.no_grad()
def evaluate(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    world: World,
    *,
    num_samples: int,
    gather: Callable[[Tensor], Samples],
    precision: str,
    before_waiting: Callable[[], None] = lambda: None,
) -> Score:
    """Score `model` with `weights`; chunk i is rank i % world_size's. Training mode is restored."""
    num_chunks = math.ceil(num_samples / _CHUNK)
    # One row per chunk, filled by one rank: adding zeros of the others changes no bit.
    sums = torch.zeros(num_chunks, 2, dtype=torch.float64, device=world.device)
    model.eval()
    for chunk in range(world.rank, num_chunks, world.size):
        ids = torch.arange(chunk * _CHUNK, min((chunk + 1) * _CHUNK, num_samples))
        samples = gather(ids)
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = functional_call(model, dict(weights), (samples.images,))
        sums[chunk, 0] = cross_entropy(logits.float(), samples.labels, reduction="sum")
        sums[chunk, 1] = (logits.argmax(dim=1) == samples.labels).sum()
    model.train()
    before_waiting()
    dist.all_reduce(sums)
    loss, correct = (math.fsum(column) for column in sums.T.tolist())
    return Score(loss=loss / num_samples, accuracy=correct / num_samples)
