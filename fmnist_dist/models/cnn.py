"""The default network: two convolution blocks and a linear classifier."""

from torch import Tensor, nn


class Cnn(nn.Module):
    """(Conv2d 3x3 -> MaxPool2d -> BatchNorm2d -> ReLU) x 2 -> Dropout -> Linear.

    Pooling comes right after the convolution, so that normalisation and activation see a quarter
    of the values; pooling and ReLU commute (airbench, K. Jordan, arXiv 2404.00498, section 3).
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        dropout: float,
        widths: tuple[int, int] = (32, 64),
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        first, second = widths
        self.blocks = nn.Sequential(_block(channels, first), _block(first, second))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(second * (height // 4) * (width // 4), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] for images [B, channels, height, width]."""
        features: Tensor = self.blocks(images)
        logits: Tensor = self.classifier(self.dropout(features.flatten(1)))
        return logits


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
