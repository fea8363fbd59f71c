"""The same function of the same weights, computed faster: nothing here changes a result by more than rounding."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nin.networks.layers import Layer

# The largest maps of a piece of a batch stay below this, so that the next layer finds them in a CPU's cache. In bytes.
_CACHED = 18 * 2**20


class MaxPoolReLU(nn.MaxPool2d):
    """ReLU behind a max pooling instead of before it: the same values and gradients, on a quarter of the maps."""

    def forward(self, maps: Tensor) -> Tensor:
        return functional.relu_(super().forward(maps))


class Dropout(nn.Dropout):
    """The mask that the whole batch would have had in torch's own layout, for a batch in micro_batch and in any layout.

    It is drawn before the network is called, so that a compiled network is one graph with the same mask.

    Args:
        shape: of one image's maps.
    """

    def __init__(self, p: float, shape: Sequence[int]):
        super().__init__(p)
        self.shape = tuple(shape)
        self.mask: Tensor | None = None
        self.done = 0

    def begin(self, batch_size: int, device: torch.device) -> None:
        """Of the next ``batch_size`` images; without it each call draws for itself, as torch's dropout does."""
        self.mask = functional.dropout(torch.ones(batch_size, *self.shape, device=device), self.p)
        self.done = 0

    def forward(self, piece: Tensor) -> Tensor:
        if not self.training or self.mask is None:
            return super().forward(piece)
        begun, self.done = self.done, self.done + len(piece)
        return piece * self.mask[begun : self.done].to(piece.dtype)


def move_relu_after_pooling(network: nn.Sequential) -> None:
    """In place; names and order of the weights stay as they are."""
    for i, layer in enumerate(network):
        if not isinstance(layer, nn.MaxPool2d) or i == 0:
            continue
        before, last = (network[i - 1], -1) if isinstance(network[i - 1], nn.Sequential) else (network, i - 1)
        if isinstance(before[last], nn.ReLU):
            before[last] = nn.Identity()
            network[i] = MaxPoolReLU(layer.kernel_size, layer.stride, layer.padding)


def micro_batch_size(network: nn.Sequential, rows: list[Layer]) -> int | None:
    """How many images are best worked through at a time on a CPU, or None if the batch must be kept whole.

    Batch norm needs it whole. ``rows`` are the network's layers at the size of its images.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        return None
    largest = max(4 * torch.Size(layer.output_shape).numel() for layer in rows)
    return max(1, _CACHED // largest)


def replace_dropout(network: nn.Sequential, rows: list[Layer]) -> list[Dropout]:
    """Puts dropout that hangs neither on micro_batch nor on the layout in the place of the network's own; returns it."""
    for i, row in enumerate(rows):
        if type(network[i]) is nn.Dropout:
            network[i] = Dropout(network[i].p, row.output_shape)
    return [layer for layer in network if isinstance(layer, Dropout)]
