"""What is saved, when and under which name, so that a run goes on to the very result that it would have had."""

import logging
import signal
import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger

from nin.checkpoints.loop_state import rewrite_loop_state
from nin.checkpoints.random_state import random_state, set_random_state
from nin.runs.folder import RunFolder
from nin.system.signals import StoppedError, StopRequest
from nin.training.callbacks.metrics import MetricsLogger, ends

log = logging.getLogger(__name__)


class ResumableCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a run goes on to the very result that it would have had, and ``best.ckpt``.

    ``last.ckpt`` is written after every epoch, after every ``every_n_steps`` optimiser steps, one step before
    ``trainer.max_steps``, and when a stop is asked for. ``best.ckpt`` is the epoch with the highest val/acc, of several
    the one with the lowest val/loss; where nothing is held out to choose by, it is the last epoch.

    Besides what Lightning saves: every generator's random state, and how much of each event file had been written.
    """

    def __init__(self, folder: RunFolder, every_n_steps: int | None, watch: MetricsLogger, stop: StopRequest):
        self.folder, self.every_n_steps, self.watch, self.stop = folder, every_n_steps, watch, stop
        self.best: dict[str, float] = {}
        self.saved_step = 0
        self.loaded: dict[str, Any] | None = None
        self._place = "epoch end"

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.stop.listen()  # Lightning has just put its own handlers in place
        if self.loaded:
            trainer.should_stop = self.loaded["should_stop"]
            # Lightning has forgotten it where the optimiser's schedule asked for the number of batches.
            trainer.train_dataloader.load_state_dict(self.loaded["batches"])
            own = self.loaded["processes"][trainer.global_rank]
            set_random_state(own["random_state"], module.device)
            module.load_state_dict({k: v.to(module.device) for k, v in own["metrics"].items()}, strict=False)
            self.loaded = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        # Gradients that are still being accumulated are not saved; after the last batch the epoch's end is near.
        if loop._should_accumulate() or trainer.is_last_batch or ends(trainer):
            return
        # A run of max_steps ends with a validation that Lightning can't begin again: it begins one step before.
        due = self._due(trainer) or trainer.global_step + 1 == trainer.max_steps
        if due and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            self._save(trainer, "mid epoch")

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._may_save_here(trainer) and not ends(trainer) and self._due(trainer):
            self._save(trainer, "before validation")

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not self._may_save_here(trainer) or not self._asked_to_stop(trainer):
            return
        if not ends(trainer):
            self._save(trainer, "before validation")  # and stops
        # Lightning can't begin the last validation again: what a checkpoint lacks by then is saved behind it.
        elif self.saved_step >= trainer.global_step - 1:
            raise StoppedError(self.stop.signum)

    def _may_save_here(self, trainer: Trainer) -> bool:
        """Not between batches whose gradients are added up: a checkpoint would lack them."""
        return not trainer.sanity_checking and not trainer.fit_loop.epoch_loop._should_accumulate()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        # Scores of weights that have changed since then choose nothing.
        fresh = self.watch.scores if self.watch.scored_step == trainer.global_step else {}
        scores = {name: value for name, value in fresh.items() if name.startswith("val/")}
        # Without any validation the last epoch is the best; one epoch without is not.
        better = not self.best or (scores and _rank(scores) > _rank(self.best))
        if better:
            self.best = scores
        self._save(trainer, "epoch end", bool(better))

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.stop.listen()

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._asked_to_stop(trainer):
            raise StoppedError(self.stop.signum)

    def _due(self, trainer: Trainer) -> bool:
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        return bool(due and trainer.global_step != self.saved_step) or self._asked_to_stop(trainer)

    def _asked_to_stop(self, trainer: Trainer) -> bool:
        """Whether any of the processes was asked to; then all of them were."""
        asked = trainer.strategy.reduce_boolean_decision(self.stop.signum is not None, all=False)
        if asked and self.stop.signum is None:
            self.stop.signum = signal.SIGTERM
        return asked

    def _save(self, trainer: Trainer, place: str, best: bool = False) -> None:
        begun = time.perf_counter()
        self._place, self.saved_step = place, trainer.global_step
        trainer.save_checkpoint(self.folder.fresh, weights_only=False)
        if trainer.is_global_zero:
            # The best first: killed in between, the run repeats the epoch and finds it again.
            self.folder.publish(best)
        trainer.strategy.barrier()  # ddp's other processes read it at the end
        seconds = time.perf_counter() - begun
        log.info("saved last.ckpt%s at step %d in %.3f s", " and best.ckpt" if best else "", self.saved_step, seconds)
        if self._asked_to_stop(trainer):
            raise StoppedError(self.stop.signum)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        rewrite_loop_state(checkpoint["loops"]["fit_loop"], self._place)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.flush()
        # Each process has its own, and Lightning saves those of the first.
        own = {"random_state": random_state(module.device), "metrics": module.metrics_so_far()}
        processes = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(processes, own)
        checkpoint["callbacks"][self.state_key] = {
            "best": self.best,
            "saved_step": self.saved_step,
            "should_stop": trainer.should_stop,
            "processes": processes,
            "run_id": self.folder.read_state().get("run_id"),
            "batches": trainer.train_dataloader.state_dict(),
            "event_files": self.folder.event_file_sizes(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state
        self.best, self.saved_step = state["best"], state["saved_step"]


def _rank(scores: dict[str, float]) -> tuple[float, float]:
    return scores["val/acc"], -scores["val/loss"]
