"""What Lightning leaves open at the start, the end and between the epochs of training, and what has ended it early."""

from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nin.checkpoints.random_state import seed_rank
from nin.config.keys import is_within
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.classifier import Classifier


class TrainingControl(Callback):
    """Ends training at ``max_steps`` with a validation, and steps a ReduceLROnPlateau schedule after each epoch.

    Lightning would step the schedule after the epoch's checkpoint is saved. Before the first step, each of several
    processes gets random generators of its own, for dropout and augmentation: Lightning seeds all alike, so that they
    start with the same weights.

    Args:
        metrics: the callback that has the epoch's validation metrics; it must be called before this one.
    """

    def __init__(self, metrics: MetricsLogger):
        self.metrics = metrics

    def on_fit_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        # Before the training loader draws the seed of its worker processes. A checkpoint, which is restored after this,
        # has the generators of each process.
        if trainer.global_rank:
            seed_rank(pl_module.settings.seed, trainer.global_rank)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            # Lightning then validates before it ends, also in the middle of an epoch, if it has no minimum to reach.
            trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = 0
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau) and "val/loss" in self.metrics.scores:
                config.scheduler.step(self.metrics.scores["val/loss"])


def why_stopped(trainer: Trainer) -> str | None:
    """Why training ended before ``max_epochs`` and ``max_steps``; None if it did not.

    Also None for a run that is resumed after its training ended within its last epoch: no checkpoint has the step at
    which it ended.
    """
    batches = trainer.fit_loop.epoch_loop.batch_progress
    is_within_epoch = batches.current.ready > 0 and not batches.is_last_batch
    is_complete = trainer.current_epoch == trainer.max_epochs and not is_within_epoch
    if not trainer.should_stop or is_complete or trainer.global_step == trainer.max_steps:
        return None
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning, missing in its types
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            return f"EarlyStopping: {callback.stopping_reason_message}".removesuffix(" Signaling Trainer to stop.")
        if isinstance(callback, Timer) and (remaining := callback.time_remaining()) is not None and remaining <= 0:
            return "Timer: the time limit (trainer.max_time) is reached"
    own = [type(c).__name__ for c in callbacks if not is_within(type(c).__module__, ["nin", "lightning"])]
    return f"trainer.should_stop was set by one of: {', '.join(own)}" if own else "trainer.should_stop was set"
