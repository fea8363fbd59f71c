"""Ends training at ``max_steps`` with a validation, and steps a schedule that follows val/loss."""

from typing import Any

from lightning import Callback, Trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nin.training.callbacks.metrics import MetricsLogger
from nin.training.classifier import Classifier


class TrainingControl(Callback):
    """Ends training at ``max_steps`` with a validation, and steps a ReduceLROnPlateau schedule after each epoch.

    Lightning would step the schedule after the epoch's checkpoint is saved.

    Args:
        metrics: the callback that has the epoch's validation metrics; it must be called before this one.
    """

    def __init__(self, metrics: MetricsLogger):
        self.metrics = metrics

    def on_train_batch_end(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates before it ends, also in the middle of an epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau) and "val/loss" in self.metrics.scores:
                config.scheduler.step(self.metrics.scores["val/loss"])
