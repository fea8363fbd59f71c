"""What a network takes from its training images before training (``data.normalize``, ``model.init``)."""

import torch
from lightning import Callback, Trainer

from nin.networks.components import start_from_components
from nin.networks.normalize import Normalize
from nin.training.classifier import Classifier

# Patches of so many images: their components are those of all training images within a few percent.
_IMAGES = 256


class FromTrainingImages(Callback):
    """Sets the mean and deviation of a `Normalize` layer, and the first filters of ``init=kaiming_dirac_pca``.

    A resumed run has those of its checkpoint, which Lightning loads afterwards.
    """

    def setup(self, trainer: Trainer, pl_module: Classifier, stage: str) -> None:
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, missing in its types
        first = next(iter(pl_module.network.children()))
        if isinstance(first, Normalize):
            first.set_statistics(*data.statistics())
        if getattr(pl_module.settings.model, "init", None) == "kaiming_dirac_pca":
            images = data.sample(_IMAGES)
            with torch.no_grad():
                start_from_components(pl_module.network, first(images) if isinstance(first, Normalize) else images)
