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

from nin.callbacks import EventStream, Watch
from nin.checkpoints import Checkpoints
from nin.classifier import Classifier
from nin.data.datamodule import ImageData
from nin.progress import Bar
from nin.run_folder import RunFolder
from nin.settings import Settings
from nin.stopping import StopRequest
from nin.trainer import build_trainer

Told = Callable[[str], None]  # takes a line that says what is measured now


@contextlib.contextmanager
def project(settings: Settings) -> Iterator[tuple[Classifier, ImageData, Callable[..., Trainer]]]:
    """What `nin train` trains with: its bar (drawn nowhere), loggers and checkpoints, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as path, Path(os.devnull).open("w") as nowhere, StopRequest() as stop:
        folder = RunFolder(path)
        folder.checkpoints.mkdir()
        lightning.seed_everything(settings.seed, verbose=False)
        opened = []

        def build(more: list[Callback]) -> Trainer:
            watch = Watch(folder.metrics)
            bar = Bar(watch)
            bar.console = Console(file=nowhere, force_terminal=True, width=120)
            kept = Checkpoints(folder, settings.checkpoint.every_n_steps, watch, stop)
            trainer = build_trainer(settings, folder.path, [watch, bar, kept, *more])
            opened.extend(trainer.loggers)
            return trainer

        try:
            yield Classifier(settings), ImageData(settings.data, settings.seed), build
        finally:
            for logger in opened:
                if isinstance(logger, EventStream):
                    logger.close()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
