"""The networks that can be trained, by name."""

from torch import nn

from fmnist_dist.models.cnn import Cnn


def make_model(
    name: str, *, image_shape: tuple[int, int, int], num_classes: int, dropout: float
) -> nn.Module:
    """Return a fresh network for images of `image_shape` (channels, height, width)."""
    match name:
        case "cnn":
            return Cnn(image_shape=image_shape, num_classes=num_classes, dropout=dropout)
        case _:
            raise ValueError(f"unknown model {name!r}")
