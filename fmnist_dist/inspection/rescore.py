"""Scoring a saved state again, with the model and the test split built as the job builds them."""

from dataclasses import dataclass

import torch

from fmnist_dist.build import initial_state, make_evaluation
from fmnist_dist.checkpoint.restore import Restored
from fmnist_dist.config import Config
from fmnist_dist.data.dataset import load_dataset
from fmnist_dist.distributed import world
from fmnist_dist.filenames import EMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    step: int
    test_accuracy: float  # 0…1
    test_loss: float
    samples: int
    weights: str  # ema | model


def rescore(restored: Restored, config: Config) -> Rescored:
    """Score a checkpoint in a world of one; bit for bit what the run records at that step.

    `config` holds the run's settings, and this process's device and data folder. Raises what
    loading the data set and choosing the device raise.
    """
    # Threads belong to a run's bits: another number may add up in another order.
    torch.set_num_threads(config.threads_per_worker)
    with world.alone(world.device_of(config.device, local_rank=0)) as joined:
        dataset = load_dataset(config.dataset, data_dir=config.data_dir)
        state = initial_state(config, dataset, joined.device)
        checkpoint = restored.commit.checkpoint
        state.load(
            restored.files,
            step=checkpoint.step,
            ledger=checkpoint.ledger,
            metrics=checkpoint.metrics,
            evaluated=checkpoint.evaluated,
        )
        score = make_evaluation(config, dataset, joined, state)()
    return Rescored(
        step=state.step,
        test_accuracy=score.accuracy,
        test_loss=score.loss,
        samples=len(dataset.test.images),
        weights="ema" if EMA in restored.files else "model",
    )
