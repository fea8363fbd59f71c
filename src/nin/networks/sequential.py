"""The base class of all networks; the layers of a sequence; the fully connected layers in which several end."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn


class Network(nn.Sequential):
    """A sequence of layers whose slices are plain ``nn.Sequential`` modules that share the layers.

    ``nn.Sequential`` builds a slice by calling the class of ``self`` with the layers, which fails in a subclass whose
    constructor takes hyperparameters.
    """

    def forward(self, input: Tensor) -> Tensor:
        # As `nn.Sequential` does. Where the `forward` is torch's own, `compile` of torch 2.9 and 2.10 compiles no more
        # than the layers whose `forward` is not.
        for layer in self:
            input = layer(input)
        return input

    def __getitem__(self, idx: slice | int) -> Any:
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[idx]))  # the layers keep their names
        return super().__getitem__(idx)


def list_layers(layer: nn.Module) -> list[nn.Module]:
    """The layers of an ``nn.Sequential``, in order; of any other module, the module itself."""
    # A subclass with a forward of its own may do more than call its layers.
    if isinstance(layer, nn.Sequential) and type(layer).forward in (nn.Sequential.forward, Network.forward):
        return list(layer)
    return [layer]


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
