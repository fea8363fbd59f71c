"""The base class of all networks."""

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
