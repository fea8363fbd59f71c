"""What a network takes from its training images before training (``data.normalize``, ``model.init``)."""

from typing import Any

import torch
from torch import nn

from nin.config.schema import OwnModel, Settings
from nin.data.module import ImageDataModule
from nin.networks.components import start_from_components
from nin.networks.normalize import Normalize

# The number of images whose patches are used.
_IMAGES = 256


def start_from_training_images(network: nn.Sequential, settings: Settings, data: Any) -> None:
    """Sets the mean and deviation of a `Normalize` layer, and the first filters of ``init=kaiming_dirac_pca``.

    Args:
        data: the Trainer's data module.

    Raises:
        TypeError: if it is no `ImageDataModule`, and the network needs its training images.
    """
    first = next(iter(network.children()))
    normalize = first if isinstance(first, Normalize) else None
    # A network of the user's own may have an argument of that name.
    has_components = not isinstance(settings.model, OwnModel) and settings.model.init == "kaiming_dirac_pca"
    if not (normalize or has_components):
        return
    if not isinstance(data, ImageDataModule):
        raise TypeError("data.normalize=true and model.init=kaiming_dirac_pca need an ImageDataModule as datamodule")
    with torch.no_grad():
        if normalize:
            normalize.set_statistics(*data.statistics())
        if has_components:
            images = data.sample(_IMAGES)
            start_from_components(network, normalize(images) if normalize else images)
