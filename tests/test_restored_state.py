"""A state is read from a checkpoint's bytes where they lie, and keeps none of them."""

import torch
from safetensors.torch import load, save
from step_child import small_dataset

from fmnist_dist import tensorfile
from fmnist_dist.data.feed import TrainingFeed
from fmnist_dist.distributed import world
from fmnist_dist.distributed.step import ShardedStep, Wishes
from fmnist_dist.models.cnn import Cnn
from fmnist_dist.plan import Plan, Settings
from fmnist_dist.staging import Staging
from fmnist_dist.state import TrainState

SETTINGS = Settings(
    epochs=2,
    batch_size=8,
    lr=0.1,
    schedule="cosine",
    weight_decay=1e-3,
    label_smoothing=0.0,
    ema=0.9,
    augment="none",
)
CPU = torch.device("cpu")


def new_state() -> TrainState:
    torch.manual_seed(1)
    model = Cnn(image_shape=(1, 28, 28), num_classes=10, dropout=0.0, widths=(4, 8))
    model.to(memory_format=torch.channels_last)
    return TrainState(model, optimizer="adamw", settings=SETTINGS)


def trained() -> TrainState:
    """Return a state after two steps: its optimizer has slots, its buffers have counted."""
    state = new_state()
    plan = Plan(SETTINGS, num_samples=32)
    feed = TrainingFeed(small_dataset(32), seed=5, device=CPU)
    with world.alone(CPU) as joined:
        step = ShardedStep(state, joined, logical_shards=2, precision="fp32", seed=5)
        for number in range(2):
            outcome = step(plan.at(number), feed, wishes=Wishes())
            state.advance(plan.at(number), outcome.result)
        step.close()
    return state


def test_what_is_read_is_what_the_library_reads() -> None:
    tensors = {
        "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
        "half": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
        "count": torch.tensor(7, dtype=torch.int64),
        "flags": torch.tensor([[True], [False]]),
        "none": torch.empty(0, 4),
    }
    data = save(tensors)
    for given in (data, memoryview(data)):
        found = tensorfile.read(given)
        expected = load(data)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found[name], tensor)


def test_a_restored_state_is_the_saved_one_and_holds_nothing_of_the_files() -> None:
    saved, restored = trained(), new_state()
    staging = Staging(saved.tensors_by_file())
    staging.copy(saved.tensors_by_file())
    files = {name: bytearray(data) for name, data in staging.files().items()}
    restored.load(
        {name: memoryview(data) for name, data in files.items()},
        step=saved.step,
        ledger=saved.ledger,
        metrics=saved.metrics,
        evaluated=False,
    )
    assert restored.digest() == saved.digest()
    for data in files.values():
        data[:] = b"\xff" * len(data)
    assert restored.digest() == saved.digest()


def test_a_state_that_another_rank_has_sent_holds_nothing_of_its_image() -> None:
    saved, restored = trained(), new_state()
    image = bytearray(b"".join(saved.image()))
    restored.load_image(memoryview(image))
    image[:] = b"\xff" * len(image)
    assert restored.digest() == saved.digest()
