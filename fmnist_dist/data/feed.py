"""Feeds training: the samples of a step, in their epoch's order and with their augmentation."""

import torch
from torch import Tensor

from fmnist_dist import plan
from fmnist_dist.data import augment
from fmnist_dist.data.dataset import Dataset
from fmnist_dist.data.order import epoch_order
from fmnist_dist.data.split import Augmentation, Batch, Split


class TrainingFeed:
    """A pure function of (seed, step); it remembers only what it need not compute again."""

    def __init__(self, dataset: Dataset, *, seed: int, device: torch.device) -> None:
        self._dataset = dataset
        self._seed = seed
        self._device = device
        self._split: Split | None = None
        self._epoch: tuple[int, str] | None = None
        self._order: Tensor
        self._augmentation: Augmentation | None = None

    def __call__(self, step: plan.Step, start: int, stop: int) -> Batch:
        """Gather samples [start, stop) of the step's global batch."""
        split = self._prepare(step.epoch, step.settings.augment)
        ids = self._order[step.position + start : step.position + stop]
        return split.gather(ids, self._augmentation)

    def _prepare(self, epoch: int, name: str) -> Split:
        if self._split is None or self._split.padding != augment.padding_of(name):
            self._split = Split(
                self._dataset.train,
                self._dataset.spec,
                device=self._device,
                padding=augment.padding_of(name),
            )
        if self._epoch != (epoch, name):
            num_samples = self._split.num_samples
            order = epoch_order(seed=self._seed, epoch=epoch, num_samples=num_samples)
            choices = augment.draw(name, seed=self._seed, epoch=epoch, num_samples=num_samples)
            self._order = torch.from_numpy(order).to(self._device)
            self._augmentation = self._split.place(choices)
            self._epoch = (epoch, name)
        return self._split
