"""The sharded step: same bits at every world size, and the right numbers at one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from step_child import small_dataset
from torch.nn.functional import cross_entropy

from fmnist_dist import digest
from fmnist_dist.data.feed import TrainingFeed
from fmnist_dist.models.cnn import Cnn
from fmnist_dist.plan import Plan, Settings

CASE = {
    "num_samples": 61,
    "batch_size": 24,
    "logical_shards": 8,
    "batch_norm": True,
    "dropout": 0.3,
    "augment": "crop-flip",
    "optimizer": "sgd",
    "precision": "fp32",
    "steps": 7,
}


def run(sizes: list[int], **changes: Any) -> list[list[dict[str, Any]]]:
    child = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("step_child.py")),
            json.dumps({"case": {**CASE, **changes}, "sizes": sizes}),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=Path(__file__).parents[1],
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        # The last batch of an epoch holds 13 samples: shards of 2 and of 1.
        ([1, 2, 3, 4, 5, 8], {}),
        # ... 5 samples for 8 shards: three are empty, and with W = 8 three ranks have nothing.
        ([1, 2, 3, 8], {"num_samples": 29, "batch_size": 8, "optimizer": "adamw"}),
        # V is no power of two.
        ([1, 2, 5, 6], {"logical_shards": 6, "precision": "bf16"}),
    ],
    ids=["uneven", "empty", "six"],
)
def test_every_world_size_ends_with_the_same_bits(
    sizes: list[int], changes: dict[str, Any]
) -> None:
    worlds = run(sizes, **changes)
    assert [len(ranks) for ranks in worlds] == sizes
    first = worlds[0][0]
    for ranks in worlds:
        for rank in ranks:
            assert rank == first
    assert len(set(first["losses"])) == len(first["losses"])  # something was learned, step by step
    assert first["tracked"] == [CASE["steps"]] * 2  # an integer buffer counts steps, not shards
    assert first["asked"] == [False, False, True, False, False, False, False]
    # One collective each, and one in which DDP orders its buckets, which it did not do by itself:
    # whoever waits in it for a peer that has died must be found.
    assert first["announced"] == [0, 1, 1, 2, 3, 4, 5, 6]
    assert not first["unannounced"]


def test_the_ledger_sums_every_sample_of_an_epoch_once() -> None:
    (ranks,) = run([3], steps=3)
    ((epoch, count, *lanes),) = ranks[0]["ledger"]
    assert (epoch, count) == (0, 61)
    assert tuple(lanes) == digest.of_all(61)


def test_one_shard_trains_like_plain_pytorch() -> None:
    """V = 1 without dropout is SGD as everybody writes it: the machinery adds nothing."""
    (ranks,) = run([1], logical_shards=1, dropout=0.0)
    torch.manual_seed(1)
    model = Cnn(image_shape=(1, 28, 28), num_classes=10, dropout=0.0, widths=(4, 8))
    settings = Settings(
        epochs=50,
        batch_size=24,
        lr=0.1,
        schedule="cosine",
        weight_decay=1e-3,
        label_smoothing=0.1,
        ema=0.9,
        augment="crop-flip",
    )
    plan = Plan(settings, num_samples=61)
    feed = TrainingFeed(small_dataset(61), seed=5, device=torch.device("cpu"))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 1e-3}, {"params": plain, "weight_decay": 0.0}],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    losses = []
    for number in range(7):
        step = plan.at(number)
        batch = feed(step, 0, step.size)
        for group in optimizer.param_groups:
            group["lr"] = step.lr
        loss = cross_entropy(model(batch.images), batch.labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert ranks[0]["losses"] == pytest.approx(losses, rel=1e-4)
    mine = ranks[0]["weights"]
    assert mine == pytest.approx(model.classifier.weight.flatten()[:5].tolist(), rel=1e-3)


def test_eight_shards_add_up_to_the_gradient_of_the_whole_batch() -> None:
    """Without BatchNorm, which normalises each shard by itself, V changes rounding only."""
    (eight,), (one,) = (run([1], batch_norm=False, logical_shards=shards) for shards in (8, 1))
    assert eight[0]["losses"] == pytest.approx(one[0]["losses"], rel=1e-4)
    assert eight[0]["weights"] == pytest.approx(one[0]["weights"], rel=1e-3)
    assert eight[0]["weights"] != one[0]["weights"]
