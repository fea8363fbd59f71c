"""The training that is measured, and what all measurements share."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning
import torch
from lightning import Callback, Trainer
from rich.console import Console

from nin.config.schema import Settings
from nin.data.module import ImageDataModule
from nin.runs.folder import RunFolder
from nin.system.signals import StopRequest
from nin.training.callbacks.checkpoints import ResumableCheckpoint
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.callbacks.progress import TrainingProgressBar
from nin.training.callbacks.tensorboard import SingleFileTensorBoardLogger
from nin.training.classifier import Classifier
from nin.training.experiment import build_trainer

Told = Callable[[str], None]  # takes a line that says what is measured now


@contextlib.contextmanager
def project(settings: Settings) -> Iterator[tuple[Classifier, ImageDataModule, Callable[..., Trainer]]]:
    """What `nin train` trains with: its bar (drawn nowhere), loggers and checkpoints, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as path, Path(os.devnull).open("w") as nowhere, StopRequest() as stop:
        folder = RunFolder(path)
        folder.checkpoints.mkdir()
        lightning.seed_everything(settings.seed, verbose=False)
        opened = []

        def build(more: list[Callback]) -> Trainer:
            watch = MetricsLogger(folder.metrics)
            bar = TrainingProgressBar(watch)
            bar.console = Console(file=nowhere, force_terminal=True, width=120)
            kept = ResumableCheckpoint(folder, settings.checkpoint.every_n_steps, watch, stop)
            trainer = build_trainer(settings, folder.path, [watch, bar, kept, *more])
            opened.extend(trainer.loggers)
            return trainer

        try:
            data = ImageDataModule(settings.data, settings.seed)
            yield Classifier(settings, data.info.class_names, data.info.channels), data, build
        finally:
            for logger in opened:
                if isinstance(logger, SingleFileTensorBoardLogger):
                    logger.close()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
