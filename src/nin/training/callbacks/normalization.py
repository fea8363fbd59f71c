"""Gives the network the mean and deviation of its training images (``data.normalize``)."""

from lightning import Callback, Trainer

from nin.networks.normalize import Normalize
from nin.training.classifier import Classifier


class InputStatistics(Callback):
    """Sets the statistics of the network's `Normalize` layer before training.

    A resumed run has those of its checkpoint, which Lightning loads afterwards.
    """

    def setup(self, trainer: Trainer, pl_module: Classifier, stage: str) -> None:
        first = next(iter(pl_module.network.children()))
        if stage == "fit" and isinstance(first, Normalize):
            data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, missing in its types
            first.set_statistics(*data.statistics())
