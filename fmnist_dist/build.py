"""Builds what training and evaluation share: the initial state, and a way to score it."""

from collections.abc import Callable

import torch

from fmnist_dist import keys
from fmnist_dist.agreement import settings_of
from fmnist_dist.config import Config
from fmnist_dist.data.dataset import Dataset
from fmnist_dist.data.split import Split
from fmnist_dist.distributed.evaluation import Score, evaluate
from fmnist_dist.distributed.world import World
from fmnist_dist.models import make_model
from fmnist_dist.state import TrainState


def initial_state(config: Config, dataset: Dataset, device: torch.device) -> TrainState:
    """Return the state at step 0: a pure function of the settings, the same on every rank."""
    # The top bit is dropped: torch takes seeds up to 2**63 - 1 on every device.
    torch.manual_seed(keys.key(keys.Stream.INIT, config.seed) >> 1)
    model = make_model(
        config.model,
        image_shape=dataset.spec.image_shape,
        num_classes=dataset.spec.num_classes,
        dropout=config.dropout,
    )
    model.to(memory_format=torch.channels_last)  # up to twice as fast on CPUs
    model.to(device)
    return TrainState(model, optimizer=config.optimizer, settings=settings_of(config))


def make_evaluation(
    config: Config,
    dataset: Dataset,
    joined: World,
    state: TrainState,
    *,
    before_waiting: Callable[[], None] = lambda: None,
) -> Callable[[], Score]:
    """Return what scores the state's evaluated weights on the test split."""
    split: Split | None = None

    def score() -> Score:
        nonlocal split
        split = split or Split(dataset.test, dataset.spec, device=joined.device)
        gather = split.gather
        return evaluate(
            state.model,
            state.weights(),
            joined,
            num_samples=split.num_samples,
            gather=lambda ids: gather(ids, None),
            precision=config.precision,
            before_waiting=before_waiting,
        )

    return score
