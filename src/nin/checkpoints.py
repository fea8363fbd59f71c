"""What is saved, when, and under which name."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from nin.classifier import rounded
from nin.run_folder import RunFolder
from nin.settings import Settings, UserError


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name in its own folder, flushes it to disk and renames it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Keeps ``last.ckpt``, from which a run goes on, and ``best.ckpt``, which is tested.

    ``last.ckpt`` is written after every epoch and after every ``every_n_steps`` optimiser steps. ``best.ckpt`` is the
    epoch with the highest val/acc, of several the one with the lowest val/loss; where nothing is held out to choose
    by, it is the last epoch.
    """

    def __init__(self, folder: RunFolder, every_n_steps: int | None):
        self.folder, self.every_n_steps = folder, every_n_steps
        self.best: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0 and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        scores = rounded({k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")})
        better = not scores or not self.best or _rank(scores) > _rank(self.best)
        if better:
            self.best = scores
        self._save(trainer)
        if better and trainer.is_global_zero:
            copy = self.folder.checkpoints / f".best.{os.getpid()}"
            copy.unlink(missing_ok=True)
            copy.hardlink_to(self.folder.last)
            copy.replace(self.folder.best)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder.last, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]


def _rank(scores: dict[str, float]) -> tuple[float, float]:
    return scores["val/acc"], -scores["val/loss"]


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content: tensors and plain values, on the CPU.

    Raises:
        UserError: if the file is missing, no checkpoint of this project, or holds anything but data.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:
        raise UserError(
            f"{path}: can't be read as a checkpoint, which holds tensors and plain values only "
            f"({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise UserError(f"{path}: not a checkpoint of nin: it has no state_dict or no hyper_parameters")
    return checkpoint


def settings_in(checkpoint: dict[str, Any], path: Path) -> Settings:
    """The settings of the run that wrote a checkpoint.

    Raises:
        UserError: if they are not what this version of the project knows.
    """
    from omegaconf import OmegaConf

    from nin.settings import read as read_settings

    try:
        return read_settings(OmegaConf.create(checkpoint["hyper_parameters"]))
    except UserError as error:
        raise UserError(f"{path}: written by another version of nin?\n{error}") from error
