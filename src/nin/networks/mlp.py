"""A multilayer perceptron with one wide hidden layer, as in Dive into Deep Learning, section 5.2."""

from torch import nn

from nin.config.types import Fraction, Positive
from nin.networks.sequential import Network


class MLP(Network):
    """One hidden layer on the flattened image: a network without convolutions to compare the others with.

    Input: ``(batch, in_channels, image_size, image_size)``; output: logits ``(batch, num_classes)``.

    Args:
        image_size: height and width of the input.
        hidden_width: number of values of the hidden layer.
        dropout: probability of zeroing a value after the hidden layer.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        hidden_width: Positive = 4096,
        dropout: Fraction = 0.0,
    ):
        super().__init__(
            nn.Flatten(),  # (batch, 784) at 28x28
            nn.Linear(in_channels * image_size * image_size, hidden_width),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden_width, num_classes),
        )
