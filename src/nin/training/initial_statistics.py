"""Sets what a network takes from its training images before training (``data.normalize``, ``model.init``)."""

from typing import Any

import torch
from torch import nn

from nin.data.module import ImageDataModule
from nin.networks.components import start_from_components
from nin.networks.normalize import Normalize

# The number of images whose patches are used.
_IMAGES = 256


def start_from_training_images(network: nn.Sequential, data: Any, has_components: bool) -> None:
    """Sets the mean and deviation of a `Normalize` layer, and the first filters of ``init=kaiming_dirac_pca``.

    Args:
        data: the Trainer's data module.
        has_components: whether the first filters are set.

    Raises:
        TypeError: if ``data`` is no `ImageDataModule`.
    """
    normalize = network[0] if isinstance(network[0], Normalize) else None
    if not isinstance(data, ImageDataModule):
        raise TypeError("data.normalize=true and model.init=kaiming_dirac_pca need an ImageDataModule as datamodule")
    with torch.no_grad():
        if normalize:
            normalize.set_statistics(*data.compute_statistics())
        if has_components:
            images = data.sample(_IMAGES)
            start_from_components(network, normalize(images) if normalize else images)
