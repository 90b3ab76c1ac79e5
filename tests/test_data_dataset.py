"""What is loaded is Fashion-MNIST, and what is gathered is what its identity says."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published import idx_bytes

from fmnist_dist import keys
from fmnist_dist.data import augment, idx
from fmnist_dist.data.dataset import FASHION_MNIST, Dataset, RawSplit, load, load_dataset
from fmnist_dist.data.sources import Origin
from fmnist_dist.data.split import Split
from fmnist_dist.errors import DataDamagedError, UsageError

CPU = torch.device("cpu")
NUM = 200


def telling_split(*, padding: int = 0) -> Split:
    """Every pixel and the label of a sample tell which sample it is."""
    ids = np.arange(NUM, dtype=np.uint8)
    images = np.broadcast_to(ids[:, None, None, None], (NUM, 1, 28, 28)).copy()
    return Split(RawSplit(images=images, labels=ids), FASHION_MNIST, device=CPU, padding=padding)


def ids_seen(images: torch.Tensor) -> torch.Tensor:
    """Read back from normalised images which samples of `telling_split` they show."""
    return (images[:, 0, 14, 14] * 0.3530 + 0.2860).mul(255).round().to(torch.int64)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))
        cold = load_dataset("fashion-mnist", data_dir=None)
        nowhere = Origin(files=FASHION_MNIST.origin.files)  # so the second load is the cache's
        spec = dataclasses.replace(FASHION_MNIST, origin=nowhere)
        warm = load("fashion-mnist", spec, data_dir=None)
    assert np.array_equal(cold.train.images, warm.train.images)
    return warm


def test_fashion_mnist_has_its_published_shape_and_balance(fashion: Dataset) -> None:
    assert fashion.train.images.shape == (60000, 1, 28, 28)
    assert fashion.test.images.shape == (10000, 1, 28, 28)
    assert np.bincount(fashion.train.labels).tolist() == [6000] * 10
    assert np.bincount(fashion.test.labels).tolist() == [1000] * 10
    assert fashion.spec.num_classes == 10


def test_the_constants_are_the_mean_and_deviation_of_the_training_set(fashion: Dataset) -> None:
    pixels = fashion.train.images / np.float32(255)
    assert (round(float(pixels.mean()), 4),) == fashion.spec.mean
    assert (round(float(pixels.std()), 4),) == fashion.spec.std


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'fashion_mnist'.*did you mean 'fashion-mnist'"):
        load_dataset("fashion_mnist", data_dir=None)


def test_data_order_and_choices_need_no_torch() -> None:
    modules = ", ".join(f"fmnist_dist.data.{name}" for name in ("dataset", "order", "augment"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# IDX


def test_idx_elements_keep_shape_and_values_without_a_copy() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    content = np.frombuffer(bytearray(idx_bytes(array)), np.uint8)
    parsed = idx.parse(content, name="x")
    assert np.array_equal(parsed, array)
    assert np.shares_memory(parsed, content)


GOOD_IDX = idx_bytes(np.arange(24).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with 0x,"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "begins with 0x00000d01"),
        (b"\0\0\x08\0", "begins with 0x00000800"),
        (GOOD_IDX[:9], "ends inside its header: found 9 bytes"),
        (GOOD_IDX[:-1], "found 39 bytes, expected 40"),
        (GOOD_IDX + b"\0", "found 41 bytes, expected 40"),
        (b"\0\0\x08\x02" + b"\xff" * 8, "expected 18446744065119617037"),
    ],
)
def test_what_is_no_whole_idx_file_is_told(data: bytes, message: str) -> None:
    with pytest.raises(DataDamagedError, match=message):
        idx.parse(np.frombuffer(data, np.uint8), name="x")


# Split


def test_a_gathered_image_is_the_normalised_original(fashion: Dataset) -> None:
    split = Split(fashion.test, fashion.spec, device=CPU)
    batch = split.gather(torch.tensor([9999, 0, 7]), None)
    expected = (fashion.test.images[[9999, 0, 7]] / 255.0 - 0.2860) / 0.3530
    assert batch.images.dtype == torch.float32
    assert np.allclose(batch.images.numpy(), expected, atol=1e-5)
    assert batch.labels.tolist() == fashion.test.labels[[9999, 0, 7]].tolist()
    assert batch.labels.dtype == torch.int64


def test_placing_a_split_without_padding_copies_no_image(fashion: Dataset) -> None:
    split = Split(fashion.test, fashion.spec, device=CPU)
    assert split._centres.data_ptr() == fashion.test.images.ctypes.data


def test_padding_shows_only_where_something_is_augmented() -> None:
    ids = torch.randperm(NUM)
    plain, padded = (telling_split(padding=p).gather(ids, None) for p in (0, 2))
    assert torch.equal(plain.images, padded.images)


@pytest.mark.parametrize("name", augment.POLICIES)
@given(ids=st.lists(st.integers(0, NUM - 1), max_size=40))
def test_identity_and_label_are_those_of_the_image(name: str, ids: list[int]) -> None:
    split = telling_split(padding=augment.padding_of(name))
    choices = augment.draw(name, seed=0, epoch=0, num_samples=NUM)
    batch = split.gather(torch.tensor(ids, dtype=torch.int64), split.place(choices))
    assert ids_seen(batch.images).tolist() == ids
    assert batch.labels.tolist() == ids
    assert np.array_equal(batch.identity.numpy(), keys.identity_table(NUM)[ids])


@pytest.mark.parametrize("wrong", [0, 8, 199])
def test_a_planted_wrong_index_shows_in_the_identity(wrong: int) -> None:
    split = telling_split()
    wanted = torch.arange(7, 107)
    planted = wanted.clone()
    planted[50] = wrong
    expected = keys.identity_table(NUM)[7:107].sum(axis=0)
    assert split.gather(wanted, None).identity.sum(0).tolist() == expected.tolist()
    found = split.gather(planted, None)
    assert ids_seen(found.images)[50] == wrong
    assert found.identity.sum(0).tolist() != expected.tolist()


@pytest.mark.parametrize("outside", [NUM, -1])
@pytest.mark.parametrize("name", ["none", "crop-flip"])
def test_an_index_outside_the_split_is_an_error_and_no_other_sample(
    name: str, outside: int
) -> None:
    split = telling_split(padding=augment.padding_of(name))
    placed = split.place(augment.draw(name, seed=0, epoch=0, num_samples=NUM))
    with pytest.raises(IndexError):
        split.gather(torch.tensor([0, outside]), placed)


def test_choices_for_another_split_are_refused() -> None:
    for num_samples, padding in ((NUM - 1, 2), (NUM, 0)):
        choices = augment.draw("crop-flip", seed=0, epoch=0, num_samples=num_samples)
        with pytest.raises(ValueError, match="do not fit"):
            telling_split(padding=padding).place(choices)


def test_the_test_split_shows_the_same_bits_each_time_and_has_no_crops(fashion: Dataset) -> None:
    split = Split(fashion.test, fashion.spec, device=CPU)

    def digest() -> str:
        images = split.gather(torch.arange(split.num_samples), None).images
        return hashlib.sha256(images.numpy().data).hexdigest()

    assert digest() == digest()
    crops = augment.draw("crop-flip", seed=0, epoch=0, num_samples=split.num_samples)
    with pytest.raises(ValueError, match="do not fit"):
        split.place(crops)
