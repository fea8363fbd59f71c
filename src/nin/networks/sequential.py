"""The base class of all networks, and the fully connected layers in which several end."""

from collections import OrderedDict
from typing import Any

from torch import nn


class Network(nn.Sequential):
    """A sequence of layers whose slices are plain ``nn.Sequential`` modules that share the layers.

    ``nn.Sequential`` builds a slice by calling the class of ``self`` with the layers, which fails in a subclass whose
    constructor takes hyperparameters.
    """

    def __getitem__(self, idx: slice | int) -> Any:
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[idx]))  # the layers keep their names
        return super().__getitem__(idx)


def build_fully_connected_head(features: int, width: int, num_classes: int, dropout: float) -> list[nn.Module]:
    """Layers that map feature maps to logits, as in AlexNet (Krizhevsky et al. 2012, section 3.5).

    Input: ``(batch, channels, height, width)``; output: logits ``(batch, num_classes)``.

    Args:
        features: channels * height * width.
        width: of the two hidden layers.
        dropout: probability of zeroing a value after each hidden layer.
    """
    return [
        nn.Flatten(),
        nn.Linear(features, width),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(width, num_classes),
    ]
