"""What is saved, when and under which name, so that a run goes on to the very result that it would have had."""

import logging
import random
import signal
import time
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger

from nin.callbacks import Watch, ends
from nin.run_folder import RunFolder
from nin.stopping import StoppedError, StopRequest

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Keeps ``last.ckpt``, from which a run goes on to the very result that it would have had, and ``best.ckpt``.

    ``last.ckpt`` is written after every epoch, after every ``every_n_steps`` optimiser steps, one step before
    ``trainer.max_steps``, and when a stop is asked for. ``best.ckpt`` is the epoch with the highest val/acc, of several
    the one with the lowest val/loss; where nothing is held out to choose by, it is the last epoch.

    Besides what Lightning saves: every generator's random state, and how much of each event file had been written.
    """

    def __init__(self, folder: RunFolder, every_n_steps: int | None, watch: Watch, stop: StopRequest):
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
        place_loops(checkpoint["loops"]["fit_loop"], self._place)
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
            "batches": trainer.train_dataloader.state_dict(),
            "event_files": self.folder.event_file_sizes(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state
        self.best, self.saved_step = state["best"], state["saved_step"]


def _rank(scores: dict[str, float]) -> tuple[float, float]:
    return scores["val/acc"], -scores["val/loss"]


def place_loops(fit_loop: dict[str, Any], place: str) -> None:
    """Sets the counters of Lightning's loops so that it goes on right behind ``place``.

    Lightning guesses from its counters in which hook a checkpoint was saved, and repeats or leaves out epochs' ends
    and validations where it guesses wrong. Here each place has the one form that it takes rightly.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    for part in ("total", "current"):
        epoch, batch = epochs[part], batches[part]
        if place == "epoch end":
            done = epoch["processed"]
            epochs[part] = dict.fromkeys(epoch, done)
            batches[part] = dict.fromkeys(batch, batch["ready"] if part == "total" else 0)
            validation[part] = dict.fromkeys(validation[part], 0)
        elif place == "before validation":
            batches[part] = dict.fromkeys(batch, batch["ready"])
            # As if killed within its first batch: Lightning goes back and begins the validation anew.
            validation[part] = dict.fromkeys(validation[part], 0) | {"ready": 1, "started": 1}
        else:
            # Lightning counts a batch as completed only after the hook in which this is saved, and knows that.
            batches[part] = dict.fromkeys(batch, batch["ready"]) | {"completed": batch["ready"] - 1}
            validation[part] = dict.fromkeys(validation[part], 0)
    batches["is_last_batch"] = place == "before validation" and batches["is_last_batch"]
    validation["is_last_batch"] = False


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that training on ``device`` draws from, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts every generator back; that of ``device`` is left as it is where training was on another kind."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
