"""The table of a network's layers: shapes, parameters, multiply-adds and receptive fields, counted from its modules."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nin.networks.sequential import list_layers


@dataclass(frozen=True)
class Layer:
    """One row of the table.

    Attributes:
        name: of the layer's class.
        output_shape: without the batch dimension.
        parameters: their number.
        multiply_adds: per image; biases are not counted.
    """

    name: str
    output_shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def describe_layers(network: nn.Sequential, in_channels: int, image_size: int) -> list[Layer]:
    """Returns one row for each layer of ``network``, in order. The network may be on the "meta" device."""
    device = next(network.parameters(), torch.empty(0)).device  # a network of the user's own may have none
    x = torch.empty(1, in_channels, image_size, image_size, device=device)
    rows = []
    was_training = network.training
    network.eval()
    with torch.no_grad():
        for layer in network:
            with FlopCounterMode(display=False) as counter:
                x = layer(x)
            multiply_adds = counter.get_total_flops() // 2
            parameters = sum(p.numel() for p in layer.parameters())
            rows.append(Layer(type(layer).__name__, tuple(x.shape[1:]), parameters, multiply_adds))
    network.train(was_training)
    return rows


def find_receptive_fields(network: nn.Sequential, image_size: int) -> list[int]:
    """Pixels per side of the receptive field after each layer of one of the project's networks.

    That is the smallest square of the input that contains every pixel on which one output value can depend; of the
    output value for which it is largest. Padding is not counted, nor are pixels at the right and bottom border that no
    window of a strided layer reaches. The windows of these networks are square and without dilation, and their padding
    is a number; a network of the user's own may have any others.
    """
    fields, extents = [], [(i, i) for i in range(image_size)]
    for layer in network:
        for part in list_layers(layer):
            extents = _extents_after(part, extents)
        fields.append(max(0, *(last - first + 1 for first, last in extents)))
    return fields


def _extents_after(layer: nn.Module, extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first and the last input pixel on which each output position of ``layer`` can depend, along one dimension.

    Args:
        extents: the same for the positions of the layer's input.
    """
    if isinstance(layer, nn.AdaptiveAvgPool2d | nn.Linear):  # each output value depends on all positions
        return [_union(extents)]
    if not isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return extents
    kernel, stride, padding = (
        v if isinstance(v, int) else int(v[0]) for v in (layer.kernel_size, layer.stride, layer.padding)
    )
    positions = range((len(extents) + 2 * padding - kernel) // stride + 1)
    starts = [i * stride - padding for i in positions]
    return [_union(extents[max(start, 0) : max(start + kernel, 0)]) for start in starts]


def _union(extents: list[tuple[int, int]]) -> tuple[int, int]:
    if not extents:  # a window in the padding
        return (0, -1)
    return min(first for first, _ in extents), max(last for _, last in extents)


def first_fully_connected_weights(network: nn.Module) -> int:
    """The number of weights, without biases, of the first fully connected layer; 0 if there is none."""
    return next((m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear)), 0)
