"""`fmnist_dist.train` on the first 4,000 training images: epochs of seconds for tests of processes.

Everything but the length of the data set is as in `python -m fmnist_dist.train`.
"""

import sys
from dataclasses import replace

from fmnist_dist import train
from fmnist_dist.data import dataset
from fmnist_dist.data.dataset import RawSplit
from fmnist_dist.data.files import Contents


def few(contents: Contents) -> tuple[RawSplit, RawSplit]:
    parts = dataset.decode_idx(contents)
    return tuple(
        RawSplit(images=part.images[:size], labels=part.labels[:size])
        for part, size in zip(parts, (4000, 1000), strict=True)
    )


if __name__ == "__main__":
    whole = dataset.DATASETS["fashion-mnist"]
    dataset.DATASETS["fashion-mnist"] = replace(whole, decode=few)
    sys.exit(train.main())
