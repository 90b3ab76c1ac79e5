"""Order and augmentation follow from (seed, epoch, sample id), with bits that never change."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fmnist_dist.data import augment
from fmnist_dist.data.augment import Choices
from fmnist_dist.data.dataset import FASHION_MNIST, DatasetSpec, RawSplit
from fmnist_dist.data.order import epoch_order
from fmnist_dist.data.split import Split
from fmnist_dist.errors import UsageError

CPU = torch.device("cpu")
NUM = 64
NAMES = list(augment.POLICIES)


def digest(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(array.astype("<i8").tobytes()).hexdigest()


def drawn(name: str, *, seed: int = 0, epoch: int = 0, num_samples: int = 60000) -> Choices:
    choices = augment.draw(name, seed=seed, epoch=epoch, num_samples=num_samples)
    assert choices is not None
    return choices


# order


@given(st.integers(0, 2**63), st.integers(0, 10**6), st.integers(0, 3000))
def test_each_epoch_takes_each_sample_once(seed: int, epoch: int, num_samples: int) -> None:
    order = epoch_order(seed=seed, epoch=epoch, num_samples=num_samples)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))


def test_orders_of_other_epochs_and_seeds_are_unrelated() -> None:
    orders = [
        epoch_order(seed=seed, epoch=epoch, num_samples=60000)
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(60000)  # 4 sigma
            assert (one == other).sum() < 10  # of chance: 1 expected


def test_the_bits_of_the_order_never_change() -> None:
    """A run that began with an earlier version goes on with this one in mid-epoch."""
    order = epoch_order(seed=0, epoch=0, num_samples=60000)
    assert order[:8].tolist() == [46829, 30921, 54471, 14616, 55073, 22086, 3483, 14437]
    assert digest(order) == "e553d2fcd95da374e0cd411787384249c9a7e7e4e1254b44de07a0f20331619c"
    assert (
        digest(epoch_order(seed=7, epoch=3, num_samples=60000))
        == "5a6b8d23732cdb6809c0aa99ea44ba461324d9be13663e160a9719ecfc4cc22d"
    )


# choices


def test_the_bits_of_the_choices_never_change() -> None:
    choices = drawn("crop-flip")
    assert [digest(array) for array in (choices.dy, choices.dx, choices.flip)] == [
        "9c3ece4277a720b8ed61fe3879fadf4518a994ce4f9cde817989994272316f20",
        "82f2a8e5c89d55f0aee35e48e7d532d10f3dfbb4c82b4bf25c129c300cc73925",
        "130d4093aaa7f951492f65486ab3744f8481298b25b768be779cb2c0d2ff04b7",
    ]


def test_no_augmentation_draws_nothing() -> None:
    assert augment.draw("none", seed=0, epoch=0, num_samples=NUM) is None


def test_flip_alone_moves_no_image() -> None:
    choices = drawn("flip")
    assert not choices.dy.any()
    assert not choices.dx.any()
    assert choices.flip.any()


def test_an_unknown_name_is_wrong_usage_with_the_names() -> None:
    with pytest.raises(UsageError, match="found 'cropflip', expected one of none, flip, crop-flip"):
        augment.draw("cropflip", seed=0, epoch=0, num_samples=NUM)


def test_a_choice_depends_on_the_sample_and_not_on_how_many_there_are() -> None:
    few, many = (drawn("crop-flip", num_samples=n) for n in (NUM, 60000))
    for field in ("dy", "dx", "flip"):
        assert np.array_equal(getattr(few, field), getattr(many, field)[:NUM])


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (123456789, 14)])
def test_offsets_and_flips_are_uniform_and_independent(seed: int, epoch: int) -> None:
    choices = drawn("crop-flip", seed=seed, epoch=epoch)
    cells = (choices.dy * 5 + choices.dx) * 2 + choices.flip
    assert chi_square(np.bincount(cells, minlength=50)) < 94.6  # p = 1e-4 at 49 degrees of freedom


def test_choices_of_consecutive_epochs_are_independent() -> None:
    now, then = drawn("crop-flip", epoch=3), drawn("crop-flip", epoch=4)
    assert chi_square(np.bincount(now.flip * 2 + then.flip, minlength=4)) < 21.1  # p = 1e-4 at 3
    assert chi_square(np.bincount(now.dy * 5 + then.dy, minlength=25)) < 59.0  # p = 1e-4 at 24


def chi_square(counts: NDArray[np.integer]) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


# what is done to the images


def random_raw(*, channels: int = 1, height: int = 28, width: int = 28) -> RawSplit:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (NUM, channels, height, width), dtype=np.uint8)
    return RawSplit(images=images, labels=np.zeros(NUM, dtype=np.uint8))


def spec_with(channels: int) -> DatasetSpec:
    return DatasetSpec(
        title="Random",
        origin=FASHION_MNIST.origin,
        decode=FASHION_MNIST.decode,
        class_names=("all",),
        image_shape=(channels, 28, 28),
        mean=(0.0,) * channels,
        std=(1 / 255,) * channels,  # so that pixels come out as they are
    )


def naive(image: NDArray[np.uint8], choices: Choices, sample: int) -> NDArray[np.uint8]:
    """Crop and flip one image, uint8 [C, H, W], the way one reads it."""
    _, height, width = image.shape
    result = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            from_y = y + int(choices.dy[sample]) - choices.padding
            from_x = x + int(choices.dx[sample]) - choices.padding
            if 0 <= from_y < height and 0 <= from_x < width:
                result[:, y, x] = image[:, from_y, from_x]
    return result[:, :, ::-1] if choices.flip[sample] else result


@pytest.mark.parametrize("name", ["flip", "crop-flip"])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 28), (3, 8, 12)])
def test_a_batch_is_augmented_as_each_image_alone(
    name: str, channels: int, height: int, width: int
) -> None:
    raw = random_raw(channels=channels, height=height, width=width)
    split = Split(raw, spec_with(channels), device=CPU, padding=augment.padding_of(name))
    choices = drawn(name, num_samples=NUM)
    ids = torch.from_numpy(epoch_order(seed=0, epoch=0, num_samples=NUM))
    images = split.gather(ids, split.place(choices)).images
    for image, sample in zip(images, ids.tolist(), strict=True):
        assert np.allclose(image.numpy(), naive(raw.images[sample], choices, sample), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@given(st.permutations(range(NUM)), st.sets(st.integers(1, NUM - 1), max_size=7))
def test_an_augmented_sample_is_the_same_in_any_batch(
    name: str, ids: list[int], cuts: set[int]
) -> None:
    raw = random_raw(height=6, width=5)
    split = Split(raw, FASHION_MNIST, device=CPU, padding=augment.padding_of(name))
    placed = split.place(augment.draw(name, seed=5, epoch=2, num_samples=NUM))
    whole = split.gather(torch.arange(NUM), placed).images
    order = torch.tensor(ids)
    parts = torch.tensor_split(order, sorted(cuts))
    images = torch.cat([split.gather(part, placed).images for part in parts])
    assert torch.equal(images, whole[order])
