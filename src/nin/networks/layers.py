"""What a network is made of: shapes, parameters, multiply-adds and receptive fields, counted from its modules."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Layer:
    name: str
    output_shape: tuple[int, ...]  # without the batch
    parameters: int
    multiply_adds: int  # an image
    receptive_field: int  # pixels a side of the input that one output value sees, the image's own at most


def layers(network: nn.Sequential, in_channels: int, image_size: int) -> list[Layer]:
    """One row for each of the network's own layers, in order. Nothing is trained; a network on "meta" will do."""
    device = next(network.parameters()).device
    x = torch.empty(1, in_channels, image_size, image_size, device=device)
    rows, field, jump = [], 1, 1
    was_training = network.training
    network.eval()
    with torch.no_grad():
        for layer in network:
            multiply_adds = 0
            parts = list(layer) if isinstance(layer, nn.Sequential) else [layer]
            for part in parts:
                x = part(x)
                if isinstance(part, nn.Conv2d | nn.Linear):
                    # Every output value is one product with a filter or a row of weights; the bias is not counted.
                    multiply_adds += x.numel() * part.weight[0].numel()
                if isinstance(part, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
                    kernel, stride = (v if isinstance(v, int) else v[0] for v in (part.kernel_size, part.stride))
                    field, jump = field + (kernel - 1) * jump, jump * stride
                elif isinstance(part, nn.AdaptiveAvgPool2d | nn.Linear):
                    field = image_size
            parameters = sum(p.numel() for p in layer.parameters())
            prepare_images = min(field, image_size)
            rows.append(Layer(type(layer).__name__, tuple(x.shape[1:]), parameters, multiply_adds, prepare_images))
    network.train(was_training)
    return rows


def first_fully_connected_weights(network: nn.Module) -> int:
    """Weights, without biases, of the first fully connected layer behind the convolutions; 0 if there is none."""
    return next((m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear)), 0)
