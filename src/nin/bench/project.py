"""The training that is measured: the same objects that ``nin train`` uses, in a temporary run folder."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning
import torch
from lightning import Callback, Trainer
from rich.console import Console

from nin.config.schema import OwnData, Settings
from nin.data.module import ImageDataModule
from nin.runs.folder import RunFolder
from nin.system.devices import retain_freed_memory
from nin.system.processes import StopRequest
from nin.training.callbacks.checkpoints import ResumableCheckpoint
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.callbacks.progress import TrainingProgressBar
from nin.training.callbacks.tensorboard import SingleFileTensorBoardLogger
from nin.training.callbacks.training_control import TrainingControl
from nin.training.classifier import Classifier
from nin.training.trainer import build_trainer

# A function that is called before each measurement, with the part of the benchmark, the measurement's name, the number
# of measurements of this part that are done, and the number of all of them (None: not known).
Report = Callable[[str, str, int, int | None], None]


@contextlib.contextmanager
def prepare_training(
    settings: Settings,
) -> Iterator[tuple[Classifier, ImageDataModule, Callable[[list[Callback]], Trainer]]]:
    """Yields the module, the data module and a function that builds a Trainer with the given additional callbacks.

    The Trainer has the progress bar (which is drawn, and not printed), loggers and checkpoints of ``nin train``. The
    run folder is removed at the end.
    """
    with tempfile.TemporaryDirectory() as path, Path(os.devnull).open("w") as null, StopRequest() as stop:
        folder = RunFolder(path)
        folder.checkpoints.mkdir()
        retain_freed_memory()
        lightning.seed_everything(settings.seed, verbose=False)
        loggers = []

        def build(callbacks: list[Callback]) -> Trainer:
            metrics = MetricsLogger(folder.metrics)
            bar = TrainingProgressBar(metrics)
            bar.console = Console(file=null, force_terminal=True, width=120)
            checkpoint = ResumableCheckpoint(folder, settings.checkpoint, metrics, stop)
            trainer = build_trainer(
                settings, folder.path, [metrics, TrainingControl(metrics), bar, checkpoint, *callbacks]
            )
            loggers.extend(trainer.loggers)
            return trainer

        try:
            assert not isinstance(settings.data, OwnData)  # refused by the command
            data = ImageDataModule(settings.data, settings.seed)
            yield Classifier(settings, data.class_names, data.channels), data, build
        finally:
            for logger in loggers:
                if isinstance(logger, SingleFileTensorBoardLogger):
                    logger.close()


def synchronize(device: torch.device) -> None:
    """Waits until the GPU has finished its work, so that a clock read afterwards includes it."""
    if device.type in ("cuda", "mps"):
        torch.accelerator.synchronize(device)
