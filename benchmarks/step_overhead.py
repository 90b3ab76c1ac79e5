"""What the world-size-invariant reduction costs a step, against plain DDP.

    torchrun --nproc_per_node=2 benchmarks/step_overhead.py [blocks] [batch size] [dtype]

Both variants train the default CNN in one process group, in alternating blocks of steps, with the
same data path, optimizer and EMA. `plain` gives each rank its part of the batch in one forward and
backward pass under DDP's own all-reduce (local BatchNorm, no ledger, no metrics); `invariant` is
what `fmnist_dist.train` runs. Prints one JSON object.
"""

import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from fmnist_dist.agreement import settings_of
from fmnist_dist.config import Config
from fmnist_dist.data.dataset import load_dataset
from fmnist_dist.data.feed import TrainingFeed
from fmnist_dist.distributed import world
from fmnist_dist.distributed.roster import call_roll
from fmnist_dist.distributed.step import ShardedStep, Wishes
from fmnist_dist.keeper.fork import fork
from fmnist_dist.models import make_model
from fmnist_dist.plan import Plan
from fmnist_dist.state import StepResult, TrainState

STEPS_PER_BLOCK = 10
WARM_UP_BLOCKS = 1


def main() -> None:
    """Run the blocks and print the comparison."""
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    batch_size = int(sys.argv[2]) if len(sys.argv) > 2 else 512
    precision = sys.argv[3] if len(sys.argv) > 3 else "fp32"
    config = Config(batch_size=batch_size, precision=precision)
    torch.set_num_threads(config.threads_per_worker)
    dataset = load_dataset(config.dataset, data_dir=None)
    roster = call_roll(os.environ, fork=lambda serve: fork(serve, name="fmnist-store"))
    with world.join(roster, roster.connect(), device=torch.device("cpu")) as joined:
        plan = Plan(settings_of(config), num_samples=60000)
        feed = TrainingFeed(dataset, seed=0, device=joined.device)
        runs = {
            "plain": _plain(config, dataset, joined, plan, feed),
            "invariant": _invariant(config, dataset, joined, plan, feed),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for block in range(blocks + WARM_UP_BLOCKS):
            for name, run_step in runs.items():
                dist.barrier()
                for _ in range(STEPS_PER_BLOCK):
                    started = time.perf_counter()
                    run_step()
                    if block >= WARM_UP_BLOCKS:
                        seconds[name].append(time.perf_counter() - started)
        if joined.is_main:
            medians = {name: statistics.median(each) for name, each in seconds.items()}
            print(
                json.dumps(
                    {
                        "torch": torch.__version__,
                        "world_size": joined.size,
                        "logical_shards": config.logical_shards,
                        "batch_size": batch_size,
                        "precision": precision,
                        "steps_each": len(seconds["plain"]),
                        "plain_ms": round(medians["plain"] * 1e3, 2),
                        "invariant_ms": round(medians["invariant"] * 1e3, 2),
                        "overhead_percent": round(
                            (medians["invariant"] / medians["plain"] - 1) * 100, 2
                        ),
                    }
                )
            )


def _state(config, dataset):
    torch.manual_seed(0)
    model = make_model(
        config.model,
        image_shape=dataset.spec.image_shape,
        num_classes=dataset.spec.num_classes,
        dropout=config.dropout,
    ).to(memory_format=torch.channels_last)
    return TrainState(model, optimizer=config.optimizer, settings=settings_of(config))


def _invariant(config, dataset, joined, plan, feed):
    state = _state(config, dataset)
    sharded = ShardedStep(
        state,
        joined,
        logical_shards=config.logical_shards,
        precision=config.precision,
        seed=0,
    )

    def run_step():
        step = plan.at(state.step)
        state.advance(step, sharded(step, feed, wishes=Wishes()).result)

    return run_step


def _plain(config, dataset, joined, plan, feed):
    state = _state(config, dataset)
    ddp = DistributedDataParallel(state.model)

    def run_step():
        step = plan.at(state.step)
        part = step.size // joined.size
        batch = feed(step, joined.rank * part, (joined.rank + 1) * part)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            logits = ddp(batch.images)
        loss = cross_entropy(
            logits.float(), batch.labels, label_smoothing=step.settings.label_smoothing
        )
        loss.backward()
        result = StepResult(
            loss=loss.item(),
            correct=0,
            count=step.size,
            digest=(0, 0),
            buffers=[buffer.clone() for buffer in state.model.buffers()],
        )
        state.advance(step, result)

    return run_step


if __name__ == "__main__":
    main()
