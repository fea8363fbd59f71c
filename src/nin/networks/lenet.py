"""LeNet-5 (LeCun et al. 1998), as in Dive into Deep Learning, section 7.6."""

from torch import nn

from nin.networks.sequential import Network


class LeNet(Network):
    """Two convolutions with sigmoids and average pooling, three fully connected layers.

    Input: ``(batch, in_channels, image_size, image_size)``; output: logits ``(batch, num_classes)``.

    Args:
        image_size: height and width of the input.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28):
        size = (image_size // 2 - 4) // 2  # 5 at 28x28
        super().__init__(
            nn.Conv2d(in_channels, 6, kernel_size=5, padding=2),  # (batch, 6, 28, 28)
            nn.Sigmoid(),
            nn.AvgPool2d(2, stride=2),  # (batch, 6, 14, 14)
            nn.Conv2d(6, 16, kernel_size=5),  # (batch, 16, 10, 10)
            nn.Sigmoid(),
            nn.AvgPool2d(2, stride=2),  # (batch, 16, 5, 5)
            nn.Flatten(),
            nn.Linear(16 * size * size, 120),
            nn.Sigmoid(),
            nn.Linear(120, 84),
            nn.Sigmoid(),
            nn.Linear(84, num_classes),
        )
