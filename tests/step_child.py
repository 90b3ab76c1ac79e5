"""Runs a few steps of a small training on several world sizes; started by `test_step.py`.

Imports torch once and forks every rank, so that eight ranks cost no eight imports. Prints, as JSON,
what each world ended with.
"""

import hashlib
import json
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # what the first optimizer imports: here once, instead of in every rank
import torch.distributed as dist
from torch import nn

from fmnist_dist.data.dataset import FASHION_MNIST, Dataset, RawSplit
from fmnist_dist.data.feed import TrainingFeed
from fmnist_dist.distributed.step import ShardedStep, Wishes
from fmnist_dist.distributed.world import World
from fmnist_dist.models.cnn import Cnn
from fmnist_dist.plan import Plan, Settings
from fmnist_dist.staging import Staging
from fmnist_dist.state import TrainState


def small_dataset(num_samples: int) -> Dataset:
    draw = np.random.default_rng(7)
    split = RawSplit(
        images=draw.integers(0, 256, (num_samples, 1, 28, 28), dtype=np.uint8),
        labels=draw.integers(0, 10, num_samples, dtype=np.uint8),
    )
    return Dataset(name="small", spec=FASHION_MNIST, train=split, test=split)


def train(world: World, case: dict) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    settings = Settings(
        epochs=50,
        batch_size=case["batch_size"],
        lr=0.1,
        schedule="cosine",
        weight_decay=1e-3,
        label_smoothing=0.1,
        ema=0.9,
        augment=case["augment"],
    )
    if case["batch_norm"]:
        model = Cnn(image_shape=(1, 28, 28), num_classes=10, dropout=case["dropout"], widths=(4, 8))
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 169, 10)
        )
    model.to(memory_format=torch.channels_last)
    state = TrainState(model, optimizer=case["optimizer"], settings=settings)
    plan = Plan(settings, num_samples=case["num_samples"])
    feed = TrainingFeed(small_dataset(case["num_samples"]), seed=5, device=torch.device("cpu"))
    losses = []
    announced = []
    step = ShardedStep(
        state,
        world,
        logical_shards=case["logical_shards"],
        precision=case["precision"],
        seed=5,
        before_waiting=lambda: announced.append(len(losses)),
    )
    announced.clear()  # torch 2.6 sends weights while it is built
    asked = []
    for number in range(case["steps"]):
        stop = world.rank == world.size - 1 and number == 2
        outcome = step(plan.at(number), feed, wishes=Wishes(stop=stop))
        state.advance(plan.at(number), outcome.result)
        losses.append(outcome.result.loss)
        asked.append(outcome.wishes.stop)
    step.close()
    staging = Staging(state.tensors_by_file())
    staging.copy(state.tensors_by_file())
    files = {**staging.files(), "rows": b"".join(row.line for row in state.rows())}
    return {
        "announced": announced,
        "unannounced": step._ddp._has_rebuilt_buckets,
        "files": {n: hashlib.sha256(d).hexdigest() for n, d in files.items()},
        "losses": losses,
        "asked": asked,
        "ledger": [[e.epoch, e.count, *e.digest] for e in state.ledger],
        "tracked": [int(b) for n, b in model.named_buffers() if n.endswith("_tracked")],
        "weights": list(model.parameters())[-2].flatten()[:5].tolist(),
    }


def rank_main(rank: int, size: int, case: dict, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    world = World(rank=rank, size=size, device=torch.device("cpu"), store=store)
    result = train(world, case)
    (folder / f"{rank}.json").write_text(json.dumps(result))


def run_world(size: int, case: dict) -> list[dict]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                try:
                    rank_main(rank, size, case, folder)
                except Exception:  # noqa: BLE001 - told here: nobody else can
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(0 if (folder / f"{rank}.json").exists() else 1)
            children.append(child)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children), "a rank failed"
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps([run_world(size, request["case"]) for size in request["sizes"]]))
