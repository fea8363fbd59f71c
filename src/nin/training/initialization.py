"""What a network starts with besides random weights: those of a checkpoint, and what its training images give."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nin.checkpoints.files import read_with_checksum
from nin.checkpoints.weights import load_matching_weights
from nin.config.schema import UserError
from nin.data.module import ImageDataModule
from nin.networks.components import start_from_components
from nin.networks.normalize import Normalize
from nin.runs.console import format_path
from nin.runs.folder import find_weights_file

# The number of images whose patches are used.
_IMAGES = 256


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run has started with.

    Attributes:
        checksum: with which the checkpoint ends: the SHA-256 of everything before it.
        description: which weights of the network they are, in one line.
    """

    checksum: str
    description: str


def start_from_checkpoint(network: nn.Module, given: Path) -> InitialWeights:
    """Loads the weights of a run's best.ckpt, or of a checkpoint, where name and shape are those of ``network``'s.

    Raises:
        UserError: if the file is no checkpoint, or none of its weights fits.
    """
    path = find_weights_file(given)
    try:
        checkpoint, checksum = read_with_checksum(path)
        others = load_matching_weights(network, checkpoint)
    except UserError as error:
        raise UserError(f"weights={given}: {error}") from error
    description = f"starting with the weights of {format_path(path)}"
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        description += f"; not in it, or in another shape: {', '.join(others[:4])}{more}"
    return InitialWeights(checksum, description)


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
