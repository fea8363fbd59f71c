"""What is saved, when and under which name; and how a good checkpoint is told from a damaged one."""

import hashlib
import io
import logging
import pickle
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf

from nin.callbacks import Watch
from nin.checks import read as read_settings
from nin.run_folder import RunFolder, replaced
from nin.settings import Settings, UserError
from nin.stopping import StoppedError, StopRequest

log = logging.getLogger(__name__)


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, with a checksum in it; reads data only, never code.

    The checksum is the zip file's comment: 64 hex digits of the SHA-256 of everything before them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getbuffer()
        content[-2:] = _DIGITS.to_bytes(2, "little")  # the comment's length, at the very end of a zip file
        digest = hashlib.sha256(content).hexdigest().encode()
        try:
            with replaced(Path(path)) as file:
                file.write(content)
                file.write(digest)
        except OSError as error:
            megabytes = len(content) / 1e6
            error.strerror = (
                f"{error.strerror}: the checkpoint of {megabytes:.0f} MB could not be saved, the one before it is "
                "kept; make room and say the same command again, which goes on from there"
            )
            raise

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return read(Path(path))


_DIGITS = 64
_ZIP_END = b"PK\x05\x06"  # 22 bytes before the comment


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content: tensors and plain values, on the CPU.

    Raises:
        UserError: if the file is missing, damaged, no checkpoint of this project, or holds anything but data.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    end = len(content) - _DIGITS
    sealed = content[end - 22 : end - 18] == _ZIP_END
    if sealed and hashlib.sha256(content[:end]).hexdigest().encode() != content[end:]:
        raise UserError(f"{path}: damaged: its content does not fit its checksum")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles of other protocols before it refuses them
            checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused: it is no checkpoint, or holds more than tensors and plain values, which could run code "
            "when it is read"
        ) from error
    except Exception as error:  # whatever torch happens on in a file that is cut off
        raise UserError(
            f"{path}: damaged, or no checkpoint: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: not a checkpoint of nin: it holds a {type(checkpoint).__name__}")
    missing = [key for key in ("state_dict", "hyper_parameters") if key not in checkpoint]
    if missing:
        raise UserError(f"{path}: not a checkpoint of this version of nin: it has no {' and no '.join(missing)}")
    return checkpoint


def settings_in(checkpoint: dict[str, Any], path: Path) -> Settings:
    """The settings of the run that wrote a checkpoint.

    Raises:
        UserError: if they are not what this version of the project knows.
    """
    try:
        return read_settings(OmegaConf.create(checkpoint["hyper_parameters"]))
    except UserError as error:
        raise UserError(f"{path}: written by another version of nin?\n{error}") from error


def require_fit(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Raises UserError, with the names, if a checkpoint's weights are not those that ``module`` has."""
    there, here = set(checkpoint["state_dict"]), set(module.state_dict())
    if odd := sorted(there ^ here):
        raise UserError(
            "the checkpoint was written by another version of nin: "
            + ", ".join(f"{name} is {'not in it' if name in here else 'unknown here'}" for name in odd[:3])
            + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        )


def newest_good(folder: RunFolder) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, or None where none was ever saved. Damaged ones are set aside with a warning.

    Raises:
        UserError: if there were checkpoints and none is good.
    """
    for path in folder.to_go_on_from():
        if not path.exists():
            continue
        try:
            checkpoint = read(path)
        except UserError as error:
            aside = next(p for i in range(1000) if not (p := path.with_name(f"{path.name}.damaged-{i}")).exists())
            path.rename(aside)
            log.warning("%s; set aside as %s", error, aside.name)
            continue
        if missing := {"loops", "callbacks", "optimizer_states", "lr_schedulers"} - checkpoint.keys():
            raise UserError(
                f"{path}: nothing to go on from: it has no {', '.join(sorted(missing))} (another version's?)"
            )
        if Checkpoints.__qualname__ not in checkpoint["callbacks"]:
            raise UserError(
                f"{path}: written by another program or version: it has no state of {Checkpoints.__qualname__}"
            )
        return path, checkpoint
    # A best.ckpt or a damaged file is the trace of progress that must not be thrown away unasked.
    if folder.checkpoints.exists() and (there := [p.name for p in folder.checkpoints.iterdir() if p.name[0] != "."]):
        raise UserError(
            f"{folder.checkpoints}: no good checkpoint to go on from (there are: {', '.join(sorted(there))}); put a "
            "good last.ckpt there, give another name=…, or remove the run's folder to start it anew"
        )
    return None


class Checkpoints(Checkpoint):
    """Keeps ``last.ckpt``, from which a run goes on to the very result that it would have had, and ``best.ckpt``.

    ``last.ckpt`` is written after every epoch, after every ``every_n_steps`` optimiser steps, and when a stop is
    asked for. ``best.ckpt`` is the epoch with the highest val/acc, of several the one with the lowest val/loss; where
    nothing is held out to choose by, it is the last epoch.

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
            set_random_state(self.loaded["random_state"])
            self.loaded = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        # Gradients that are still being accumulated are not saved; after the last batch the epoch's end is near.
        if loop._should_accumulate() or trainer.is_last_batch or trainer.should_stop:
            return
        # A run of max_steps ends with a validation that Lightning can't begin again: it begins one step before.
        due = self._due(trainer) or trainer.global_step + 1 == trainer.max_steps
        if due and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            self._save(trainer, "mid epoch")

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.should_stop and self._due(trainer):
            self._save(trainer, "before validation")

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._asked_to_stop(trainer) and not trainer.sanity_checking:
            if not trainer.should_stop:
                self._save(trainer, "before validation")
            raise StoppedError(self.stop.signum)

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
        fresh = self.folder.checkpoints / ".fresh.ckpt"
        trainer.save_checkpoint(fresh, weights_only=False)
        if trainer.is_global_zero:
            # The best first: killed in between, the run repeats the epoch and finds it again.
            self.folder.publish(fresh, best)
        seconds = time.perf_counter() - begun
        log.info("saved last.ckpt%s at step %d in %.3f s", " and best.ckpt" if best else "", self.saved_step, seconds)
        if self.stop.signum is not None:
            raise StoppedError(self.stop.signum)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        place_loops(checkpoint["loops"]["fit_loop"], self._place)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.flush()
        checkpoint["callbacks"][self.state_key] = {
            "best": self.best,
            "saved_step": self.saved_step,
            "should_stop": trainer.should_stop,
            "random_state": random_state(),
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


def random_state() -> dict[str, Any]:
    """The state of every generator of random numbers, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts every generator back; those of a device that is not here, or was not there, are left as they are."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
