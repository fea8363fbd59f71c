"""Normalization of the input by the mean and standard deviation of the training images (``data.normalize``)."""

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtracts each channel's mean and divides by its standard deviation.

    Input and output: ``(batch, channels, height, width)``. It is a layer of the network, so that checkpoints and
    exports have the statistics. Until they are set it changes nothing.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets mean and standard deviation, ``(channels,)`` each; a channel without any variation is not scaled."""
        self.mean.copy_(mean.view(-1, 1, 1))
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
