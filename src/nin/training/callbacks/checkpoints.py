"""Saves checkpoints from which a run resumes to exactly the result of an uninterrupted run, and restores its state."""

import logging
import math
import time
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from nin.checkpoints.checkpoint_io import require_loadable_states
from nin.checkpoints.files import STATE_FORMAT, rotate_checkpoints
from nin.checkpoints.loop_state import SavePoint, rewrite_loop_state
from nin.checkpoints.random_state import get_random_state, set_random_state
from nin.checkpoints.weights import TRAINING_METRICS, find_frozen, restore_frozen
from nin.config.schema import Checkpoint as CheckpointSettings
from nin.runs.folder import RunFolder
from nin.system.processes import StoppedError, StopRequest
from nin.training.callbacks.loops import (
    has_position,
    is_accumulating,
    is_stopping,
    make_iterator,
    reload_epochs,
    set_reload_epochs,
    validation_follows,
)
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.classifier import Classifier
from nin.training.loss import require_finite_weights
from nin.training.optimizers import require_restored

log = logging.getLogger(__name__)


class ResumableCheckpoint(Checkpoint):
    """Saves ``last.ckpt``, from which a run resumes to exactly the result of an uninterrupted run, and ``best.ckpt``.

    ``last.ckpt`` is saved after every epoch, after every ``every_n_steps`` optimizer steps, ``every_n_minutes`` after
    the last save, one step before ``trainer.max_steps``, and when a signal requests a stop. ``best.ckpt`` is the epoch
    with the highest val/acc, and among equal ones that with the lowest val/loss; without held-out images it is the last
    epoch.

    The callback's state adds to what Lightning saves: the random state and training metrics of every process, the
    position in the data, and the size of each event file.

    Args:
        folder: the run's folder.
        settings: number of optimizer steps and minutes between two saves; with None for both it saves after each epoch.
            And how many earlier checkpoints are kept.
        metrics: the callback whose latest validation metrics choose the best epoch.
        stop: the signals that request a stop.
    """

    def __init__(self, folder: RunFolder, settings: CheckpointSettings, metrics: MetricsLogger, stop: StopRequest):
        self.folder, self.settings, self.metrics, self.stop = folder, settings, metrics, stop
        self.best: dict[str, float] = {}
        self.saved_step = 0
        self.saved_at = math.inf  # on the monotonic clock, in seconds
        self.is_restored = False  # whether all state is that of the checkpoint, or of a new run
        self._needs_iterator = False
        self._random_before_validation: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None
        self._save_point: SavePoint | None = None  # where the save takes place that is under way

    def on_train_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        if self._loaded:
            self._restore(trainer, pl_module, self._loaded)
            self._loaded = None
        self.is_restored = True
        require_loadable_states(trainer)  # now, and not after an epoch
        self.saved_at = time.monotonic()

    def _restore(self, trainer: Trainer, pl_module: Classifier, state: dict[str, Any]) -> None:
        """Restores what Lightning does not.

        The order matters: the iterator is made from a loader that has its position, and the random state is set after
        the iterator, which draws random numbers.
        """
        require_restored(trainer, pl_module.settings)
        loader: Any = trainer.train_dataloader
        position, own = state["batches"], state["processes"][trainer.global_rank]
        if (position is not None) != has_position(trainer):
            raise ValueError("the position in the data is missing, or the dataloader can't restore it")
        _restore_attributes(trainer, state)
        restore_frozen(pl_module.network, state["frozen"])
        if position is not None:
            loader.load_state_dict(position)
        self._restore_iterator(trainer)
        set_random_state(own["random_state"], pl_module.device, loader)
        # The validation may start again, without a training batch before it.
        self._random_before_validation = own["random_state"]
        _warn_of_random_workers(trainer, position)
        metrics = {name: own["metrics"][name].to(pl_module.device) for name in _train_metrics(pl_module)}
        pl_module.load_state_dict(metrics, strict=False)

    def _restore_iterator(self, trainer: Trainer) -> None:
        # Lightning has made the epoch's iterator already, from a loader without this position and with other random
        # numbers, and makes no other one: a worker process begins with its batches at once.
        loader: Any = trainer.train_dataloader
        if trainer.fit_loop.restarted_mid_epoch:
            _set_sampler_epoch(loader, trainer.current_epoch)
            make_iterator(trainer)  # an uninterrupted run draws its random numbers before the checkpoint
            return
        # torchdata's loader keeps the position, which is after the epoch's last batch, for the next iterator.
        if getattr(loader, "next_iter_state", None) is not None:
            make_iterator(trainer)
        self._needs_iterator = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        # Without the interruption, Lightning makes the iterator after it has set the epoch of the samplers, and after
        # other callbacks have drawn random numbers.
        if self._needs_iterator:
            self._needs_iterator = False
            make_iterator(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:
        # The iterator of torch's validation loader draws a random number before `on_validation_start`.
        if has_position(trainer) and validation_follows(trainer):
            self._random_before_validation = get_random_state(pl_module.device, trainer.train_dataloader)
        # Gradients that are being accumulated are not part of a checkpoint. After the last batch, `on_train_epoch_end`
        # saves.
        if is_accumulating(trainer) or trainer.is_last_batch or is_stopping(trainer):
            return
        if not has_position(trainer):
            self._raise_if_requested(trainer)
            return  # a run resumes from the end of an epoch: in the middle it would repeat the first batches
        # With max_steps, Lightning can't start the last validation again; the save before it is one step earlier.
        due = self._is_due(trainer) or trainer.global_step + 1 == trainer.max_steps
        # If a validation follows, `on_validation_start` saves.
        if due and not validation_follows(trainer):
            self._save(trainer, SavePoint.MID_EPOCH)

    def on_validation_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        if _can_save_in_validation(trainer) and not is_stopping(trainer) and self._is_due(trainer):
            self._save(trainer, SavePoint.BEFORE_VALIDATION)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:
        if not _can_save_in_validation(trainer) or not self._stop_requested(trainer):
            return
        if not is_stopping(trainer):
            for average in _averages(trainer):
                average.on_validation_epoch_end(trainer, pl_module)  # exchanges the average for the trained weights
            self._save(trainer, SavePoint.BEFORE_VALIDATION)  # raises StoppedError after saving
        # Lightning can't start the last validation again: steps that no checkpoint has yet are saved after it.
        elif self.saved_step >= trainer.global_step - 1:
            self._raise_if_requested(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        # Metrics of earlier weights, from a validation in the middle of the epoch, choose nothing.
        current = self.metrics.scores if self.metrics.scored_step == trainer.global_step else {}
        metrics = {name: value for name, value in current.items() if name.startswith("val/")}
        # Without any validation every epoch replaces the best; with some, an epoch without one does not.
        better = not self.best or bool(metrics and _rank(metrics) > _rank(self.best))
        if better:
            self.best = metrics
        self._save(trainer, SavePoint.EPOCH_END, better)

    def on_fit_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        if self._loaded:  # no step is left of a resumed run; the test may draw random numbers
            random = self._loaded["processes"][trainer.global_rank]["random_state"]
            set_random_state(random, pl_module.device, trainer.train_dataloader)
        # on_train_end of WeightAveraging copies the average into the module. Lightning skips the hook if a resumed run
        # has no step left; copying twice changes nothing.
        for average in _averages(trainer):
            average.on_train_end(trainer, pl_module)

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._raise_if_requested(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        steps, minutes = self.settings.every_n_steps, self.settings.every_n_minutes
        due = bool(steps and trainer.global_step % steps == 0)
        # Clocks differ between processes, and so do the steps at which a signal reaches them: one decides for all.
        late = bool(minutes and time.monotonic() - self.saved_at >= 60 * minutes)
        if trainer.strategy.reduce_boolean_decision(late or self.stop.signum is not None, all=False):
            if self._stop_requested(trainer):
                return True
            due = True
        return due and trainer.global_step != self.saved_step

    def _stop_requested(self, trainer: Trainer) -> bool:
        """Whether any of the processes received a signal; then all of them stop, each by the same signal.

        Rank 0, which has SLURM run the job again, may be the last that the signal reaches.
        """
        if trainer.world_size == 1:  # nothing is read from a GPU
            return self.stop.signum is not None
        own = torch.tensor(self.stop.signum or 0, device=trainer.strategy.root_device)
        signum = int(trainer.strategy.reduce(own, reduce_op="max"))
        if signum and self.stop.signum is None:
            self.stop.signum = signum
        return signum > 0  # the same in all processes, also if a signal has come in between

    def _raise_if_requested(self, trainer: Trainer) -> None:
        if self._stop_requested(trainer):
            assert self.stop.signum is not None  # `_stop_requested` sets it in all processes
            raise StoppedError(self.stop.signum)

    def _save(self, trainer: Trainer, save_point: SavePoint, best: bool = False) -> None:
        # The loss is checked in every step on a CPU only, and the weights only at the end of an epoch. A checkpoint
        # with NaN weights could not be resumed.
        require_finite_weights(trainer.lightning_module)
        started = time.perf_counter()
        self._save_point, self.saved_step = save_point, trainer.global_step
        try:
            trainer.save_checkpoint(self.folder.fresh, weights_only=False)
        finally:
            self._save_point = None
        if trainer.is_global_zero:
            # best.ckpt first: killed before last.ckpt is renamed, the run resumes from best.ckpt.
            rotate_checkpoints(self.folder, best, self.settings.keep)
        trainer.strategy.barrier()  # the other processes of ddp read best.ckpt at the end
        self.saved_at = time.monotonic()
        seconds = time.perf_counter() - started
        log.info("saved last.ckpt%s at step %d in %.3f s", " and best.ckpt" if best else "", self.saved_step, seconds)
        self._raise_if_requested(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Classifier, checkpoint: dict[str, Any]) -> None:
        if self._save_point:  # a ModelCheckpoint of the user's saves too, elsewhere in the loop
            rewrite_loop_state(checkpoint["loops"]["fit_loop"], self._save_point)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
            elif isinstance(logger, CSVLogger):
                logger.save()  # without this, it writes every hundred rows
        loader: Any = trainer.train_dataloader
        random = get_random_state(pl_module.device, loader)
        if self._save_point is SavePoint.BEFORE_VALIDATION and self._random_before_validation:
            random = self._random_before_validation
        # Lightning saves the state of rank 0 only; each process has its own.
        own = {"random_state": random, "metrics": _train_metrics(pl_module)}
        processes = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(processes, own)
        checkpoint["callbacks"][self.state_key] = {
            "format": STATE_FORMAT,
            "best": self.best,
            "saved_step": self.saved_step,
            "should_stop": trainer.should_stop,
            "callback_metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
            "frozen": find_frozen(pl_module.network),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "reload_epochs": reload_epochs(trainer),
            "processes": processes,
            "run_id": self.folder.read_state().get("run_id"),
            "batches": loader.state_dict() if has_position(trainer) else None,
            "event_files": self.folder.event_file_sizes(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
        self.best, self.saved_step = state_dict["best"], state_dict["saved_step"]


def _restore_attributes(trainer: Trainer, state: dict[str, Any]) -> None:
    """Restores attributes of the Trainer that Lightning does not save."""
    trainer.should_stop = state["should_stop"]
    # EarlyStopping may read those of an epoch before this one.
    trainer.callback_metrics.update(state["callback_metrics"])
    # A GradientAccumulationScheduler sets it at the start of an epoch only, and refuses another value than 1 in its
    # on_train_start, before this.
    trainer.accumulate_grad_batches = state["accumulate_grad_batches"]
    set_reload_epochs(trainer, state["reload_epochs"])


def _warn_of_random_workers(trainer: Trainer, position: dict[str, Any] | None) -> None:
    """Warns where worker processes of the training loader draw other random numbers than without the interruption."""
    loader: Any = trainer.train_dataloader
    remedy = None
    if position is None and getattr(loader, "persistent_workers", False):
        remedy = "persistent_workers=False"
    elif position is not None and trainer.fit_loop.restarted_mid_epoch and getattr(loader, "num_workers", False):
        remedy = "num_workers=0"
    if remedy:
        message = "random numbers that the workers of the training loader draw are not those of a run without"
        log.warning("%s the interruption; with %s they would be", message, remedy)


def _train_metrics(pl_module: Classifier) -> dict[str, Tensor]:
    """The state of the training metrics of this process since the last logging, on the CPU."""
    state = pl_module.state_dict()
    return {name: state[name].cpu() for name in state if name.startswith(TRAINING_METRICS)}


def _averages(trainer: Trainer) -> list[WeightAveraging]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning, missing in its types
    return [callback for callback in callbacks if isinstance(callback, WeightAveraging)]


def _can_save_in_validation(trainer: Trainer) -> bool:
    return not trainer.sanity_checking and not is_accumulating(trainer) and has_position(trainer)


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
    return metrics["val/acc"], -metrics["val/loss"]
