"""Data sets by name: a table of what they are and where they come from, and one way to load them.

Another one (CIFAR-10, a part of ImageNet) is another `DatasetSpec` in `DATASETS`, with a `decode`
for its file format.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fmnist_dist.data import cache, idx, sources
from fmnist_dist.data.files import Contents, DataFile
from fmnist_dist.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSplit:
    """One split as it was published; mapped memory where it comes from the cache."""

    images: NDArray[np.uint8]  # [N, C, H, W]
    labels: NDArray[np.uint8]  # [N], below the number of classes


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """What is known of a data set before a byte of it is read."""

    title: str
    origin: sources.Origin
    decode: Callable[[Contents], tuple[RawSplit, RawSplit]]  # decoded files to (train, test)
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, ...]  # one per channel, of the training set, for pixels in 0…1
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A data set in memory."""

    name: str
    spec: DatasetSpec
    train: RawSplit
    test: RawSplit


def load_dataset(name: str, *, data_dir: Path | None) -> Dataset:
    """Load the data set called `name`, from `data_dir` alone if that is given.

    Raises:
        UsageError: Nothing is called `name`, or `data_dir` lacks a file.
        DataDamagedError: A file in `data_dir` is damaged.
        TransientError: No source answered, or another process fetches for too long.
    """
    return load(name, spec_of(name), data_dir=data_dir)


def spec_of(name: str) -> DatasetSpec:
    """Look `name` up in `DATASETS`; a wrong one is a `UsageError` that names the nearest."""
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise UsageError(
            f"--dataset: found {name!r}, expected one of {', '.join(sorted(DATASETS))}; "
            f"did you mean {nearest!r}?"
        )
    return DATASETS[name]


def load(name: str, spec: DatasetSpec, *, data_dir: Path | None) -> Dataset:
    """Load a data set that need not be in the table; `name` is its folder in the cache."""
    if data_dir is not None:
        contents = sources.read_data_dir(data_dir, spec.origin.files)
    else:
        contents = cache.load(
            spec.origin.files,
            folder=cache.folder_of(name),
            fetch=lambda: sources.fetch(spec.title, spec.origin),
        )
    train, test = spec.decode(contents)
    return Dataset(name=name, spec=spec, train=train, test=test)


def decode_idx(contents: Contents) -> tuple[RawSplit, RawSplit]:
    """Decode the four files of the MNIST family, without a copy, to images [N, 1, H, W]."""
    train, test = (
        RawSplit(
            images=_parse(contents, f"{prefix}-images-idx3-ubyte")[:, np.newaxis],
            labels=_parse(contents, f"{prefix}-labels-idx1-ubyte"),
        )
        for prefix in ("train", "t10k")
    )
    return train, test


def _parse(contents: Contents, name: str) -> NDArray[np.uint8]:
    return idx.parse(contents[name], name=name)


FASHION_MNIST = DatasetSpec(
    title="Fashion-MNIST",
    origin=sources.Origin(
        files=(
            DataFile(
                name="train-images-idx3-ubyte",
                sha256="c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                gz_md5="8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            ),
            DataFile(
                name="train-labels-idx1-ubyte",
                sha256="bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                gz_md5="25c81989df183df01b3e8a0aad5dffbe",
            ),
            DataFile(
                name="t10k-images-idx3-ubyte",
                sha256="5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                gz_md5="bef4ecab320f06d8554ea6380940ec79",
            ),
            DataFile(
                name="t10k-labels-idx1-ubyte",
                sha256="0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
                gz_md5="bb300cfdad3c16e7a12a480ee83cd310",
            ),
        ),
        system_folder=Path("/usr/share/datasets/fashion-mnist"),
        package="dataset-fashion-mnist",
        mirror="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    decode=decode_idx,
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    image_shape=(1, 28, 28),
    mean=(0.2860,),
    std=(0.3530,),
)

DATASETS = {"fashion-mnist": FASHION_MNIST}
