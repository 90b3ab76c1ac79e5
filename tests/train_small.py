"""`fmnist_dist.train` on the first 4,000 training images: epochs of seconds for tests of processes.

Everything but the length of the data set is as in `python -m fmnist_dist.train`, unless the
environment asks for more: `TRAIN_SMALL_LIMITS="NAME=SECONDS ..."` shortens waits of `limits`, and
while the file `TRAIN_SMALL_BRAKE` exists, steps are slow, so that much can happen between them.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from fmnist_dist import limits, train
from fmnist_dist.data import dataset
from fmnist_dist.data.dataset import RawSplit
from fmnist_dist.data.files import Contents

_SLOW_SECONDS = 0.05  # of each logical shard, while the brake is on


def few(contents: Contents) -> tuple[RawSplit, RawSplit]:
    parts = dataset.decode_idx(contents)
    return tuple(
        RawSplit(images=part.images[:size], labels=part.labels[:size])
        for part, size in zip(parts, (4000, 1000), strict=True)
    )


def shorten_limits(text: str) -> None:
    for name, _, seconds in (each.partition("=") for each in text.split()):
        assert hasattr(limits, name), name
        setattr(limits, name, float(seconds))


def brake(path: Path) -> None:
    from fmnist_dist.data.feed import TrainingFeed

    feed = TrainingFeed.__call__

    def slow(self: TrainingFeed, *args: object) -> object:
        if path.exists():
            time.sleep(_SLOW_SECONDS)
        return feed(self, *args)

    TrainingFeed.__call__ = slow


if __name__ == "__main__":
    shorten_limits(os.environ.get("TRAIN_SMALL_LIMITS", ""))
    whole = dataset.DATASETS["fashion-mnist"]
    dataset.DATASETS["fashion-mnist"] = replace(whole, decode=few)
    if "TRAIN_SMALL_BRAKE" in os.environ:
        # After `train` has set how many threads NumPy has: the feed imports it.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        brake(Path(os.environ["TRAIN_SMALL_BRAKE"]))
    sys.exit(train.main())
