"""AlexNet (Krizhevsky et al. 2012), as in Dive into Deep Learning, section 8.1."""

from torch import nn

from nin.config.types import Fraction
from nin.networks.sequential import Network, build_fully_connected_head


class AlexNet(Network):
    """Five convolutions, three fully connected layers.

    Input: ``(batch, in_channels, image_size, image_size)``; output: logits ``(batch, num_classes)``.

    Args:
        image_size: height and width of the input.
        dropout: probability of zeroing a value after each hidden fully connected layer.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 224,
        dropout: Fraction = 0.5,
    ):
        size = (image_size + 2 - 11) // 4 + 1
        for _ in range(3):
            size = (size - 3) // 2 + 1  # 5 at 224x224
        super().__init__(
            nn.Conv2d(in_channels, 96, kernel_size=11, stride=4, padding=1),  # (batch, 96, 54, 54)
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),  # (batch, 96, 26, 26)
            nn.Conv2d(96, 256, kernel_size=5, padding=2),  # (batch, 256, 26, 26)
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),  # (batch, 256, 12, 12)
            nn.Conv2d(256, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),  # (batch, 256, 5, 5)
            *build_fully_connected_head(256 * size * size, 4096, num_classes, dropout),
        )
