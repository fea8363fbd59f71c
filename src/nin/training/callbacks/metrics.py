"""What is watched and drawn while training: metrics.csv, the loggers' curves and pictures."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from nin.runs.folder import write_atomically
from nin.training.classifier import rounded

COLUMNS = (
    "epoch", "step", "lr", "train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc",
    "images_per_second", "seconds",
)  # fmt: skip


class MetricsLogger(Callback):
    """Reads the metrics every ``log_every_n_steps`` and every epoch, and passes them on: loggers, metrics.csv.

    Every value is logged at the number of optimiser steps taken so far, the same axis for all.
    """

    def __init__(self, metrics_csv: Path):
        self.metrics_csv = metrics_csv
        self.latest: dict[str, float] = {}
        self.logged_step = self.scored_step = 0
        self.rows: list[dict[str, Any]] = []
        self.epoch: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        self.window_images, self.window_seconds = 0, 0.0
        self.images = self.train_seconds = self.step_seconds = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.started = time.perf_counter() - self.train_seconds
        self._open_window(self.window_images, self.window_seconds)
        if trainer.ckpt_path:
            return  # what follows is in the event files already
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                both = {"loss": ["train/loss", "val/loss"], "accuracy": ["train/acc", "val/acc"]}
                if module.settings.data.score_each_epoch == "test":
                    both = {chart: [tag.replace("val", "test") for tag in tags] for chart, tags in both.items()}
                logger.experiment.add_custom_scalars({"nin": {c: ["Multiline", tags] for c, tags in both.items()}})

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.epoch = {"images": 0, "seconds": 0.0, "loss": 0.0, "right": 0.0}
        self.scores = {}  # an epoch without a validation has none, though Lightning still has the last ones
        self._open_window()

    def _open_window(self, images: int = 0, seconds: float = 0.0) -> None:
        self.window_images, self.window_started = images, time.perf_counter() - seconds

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.window_images += len(batch[1])
        step = trainer.global_step
        if step == trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates before it ends, also in the middle of an epoch
        last = step == trainer.max_steps or trainer.is_last_batch or ends(trainer)
        due = step % trainer.log_every_n_steps == 0 or last
        # Several batches make one step where gradients are accumulated.
        if due and step != self.logged_step:
            self._read_window(trainer, module)

    def _read_window(self, trainer: Trainer, module: LightningModule) -> None:
        values = self.window_so_far(trainer, module)
        module.require_finite(values["train/loss"])
        module.train_loss.reset()
        module.train_acc.reset()
        # The last batch of an epoch may not be divided equally.
        own = torch.tensor(float(self.window_images), device=module.device)
        images = int(trainer.strategy.reduce(own, reduce_op="sum"))
        self.epoch["images"] += images
        self.epoch["seconds"] += time.perf_counter() - self.window_started
        self.epoch["loss"] += images * values["train/loss"]
        self.epoch["right"] += images * values["train/acc"]
        if trainer.global_step != self.logged_step:
            self._log(trainer, values | {"lr": _lr(trainer)})
        self.logged_step = trainer.global_step
        self._open_window()

    def window_so_far(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """The metrics of the batches since the last logging. On a GPU this waits for them."""
        metrics = {"train/loss": module.train_loss.compute(), "train/acc": module.train_acc.compute()}
        seconds = time.perf_counter() - self.window_started
        return {k: float(v) for k, v in metrics.items()} | {
            "images_per_second": self.window_images * trainer.world_size / seconds
        }

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.validation_started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking:
            # In the middle of an epoch, it is no part of the images' time.
            self._open_window(self.window_images, self.validation_started - self.window_started)
            self.scores = rounded(
                {k: v for k, v in trainer.callback_metrics.items() if k.startswith(("val/", "test/"))}
            )
            self.scored_step = trainer.global_step
            self._log(trainer, self.scores)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.window_images:
            self._read_window(trainer, module)  # trainer.max_time ended the epoch after our look at the batch
        epoch = self.epoch
        self.images += epoch["images"]
        self.step_seconds += epoch["seconds"]
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": _lr(trainer),
            "train/loss": round(epoch["loss"] / epoch["images"], 7),
            "train/acc": round(epoch["right"] / epoch["images"], 7),
            **self.scores,
            "images_per_second": round(epoch["images"] / epoch["seconds"], 1),
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        self.rows.append(row)
        self.train_seconds = time.perf_counter() - self.started
        if trainer.is_global_zero:
            self._write_rows()

    def _write_rows(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, [c for c in COLUMNS if any(c in row for row in self.rows)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.metrics_csv, text.getvalue())

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        self.latest |= values
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        now = time.perf_counter()
        return {name: getattr(self, name) for name in _KEPT} | {
            "window_seconds": now - self.window_started,
            "train_seconds": now - self.started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


# The clocks are kept apart: what they show is the time until now.
_KEPT = ("latest", "logged_step", "scored_step", "rows", "epoch", "scores", "window_images", "images", "step_seconds")


def ends(trainer: Trainer) -> bool:
    """Whether training was asked to end, and may: early stopping and max_time wait for min_epochs and min_steps."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def _lr(trainer: Trainer) -> float:
    return trainer.optimizers[0].param_groups[0]["lr"]
