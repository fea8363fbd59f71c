"""VGG-11 (Simonyan & Zisserman 2014), as in Dive into Deep Learning, section 8.2."""

from torch import nn

from nin.config.types import Fraction
from nin.networks.sequential import Network, build_fully_connected_head


class VGG(Network):
    """Five blocks of 3x3 convolutions that each end in 2x2 max pooling, three fully connected layers.

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
        layers: list[nn.Module] = []
        for convolutions, width in ((1, 64), (1, 128), (2, 256), (2, 512), (2, 512)):
            for _ in range(convolutions):
                layers += [nn.Conv2d(in_channels, width, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
                in_channels = width
            layers.append(nn.MaxPool2d(2, stride=2))  # 112, 56, 28, 14, 7 pixels per side at 224x224
        size = image_size // 32
        super().__init__(
            *layers,
            *build_fully_connected_head(512 * size * size, 4096, num_classes, dropout),
        )
