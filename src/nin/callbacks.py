"""What is watched and drawn while training: the bar, metrics.csv, the loggers' curves and pictures."""

import csv
import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nin.data.files import CLASS_NAMES
from nin.run_folder import write_whole

COLUMNS = (
    "epoch", "step", "lr", "train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc",
    "images_per_second", "seconds",
)  # fmt: skip


class Watch(Callback):
    """Reads the metrics every ``log_every_n_steps`` and every epoch, and passes them on: loggers, metrics.csv, bar.

    Every value is logged at the number of optimiser steps taken so far, the same axis for all.
    """

    def __init__(self, metrics_csv: Path, bar: "Bar"):
        self.metrics_csv, self.bar = metrics_csv, bar
        self.rows: list[dict[str, Any]] = []
        self.images = self.train_seconds = self.step_seconds = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._started = time.perf_counter()
        self.bar.start(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                both = {"loss": ["train/loss", "val/loss"], "accuracy": ["train/acc", "val/acc"]}
                if module.settings.data.score_each_epoch == "test":
                    both = {chart: [tag.replace("val", "test") for tag in tags] for chart, tags in both.items()}
                logger.experiment.add_custom_scalars({"nin": {c: ["Multiline", tags] for c, tags in both.items()}})

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.epoch = {"images": 0, "seconds": 0.0, "loss": 0.0, "right": 0.0}
        self._open_window()

    def _open_window(self) -> None:
        self.window_images, self.window_started = 0, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        self.window_images += len(batch[1])
        if trainer.is_last_batch or trainer.global_step % trainer.log_every_n_steps == 0:
            self._read_window(trainer, module)
        self.bar.advance(trainer)

    def _read_window(self, trainer: Trainer, module: LightningModule) -> None:
        loss, acc = module.train_loss.compute(), module.train_acc.compute()
        module.require_finite(loss)
        module.train_loss.reset()
        module.train_acc.reset()
        loss, acc = float(loss), float(acc)
        images = self.window_images * trainer.world_size
        seconds = time.perf_counter() - self.window_started
        for key, value in (("images", images), ("seconds", seconds), ("loss", loss * images), ("right", acc * images)):
            self.epoch[key] += value
        shown = {"train/loss": loss, "train/acc": acc, "images_per_second": images / seconds}
        self._log(trainer, shown | {"lr": trainer.optimizers[0].param_groups[0]["lr"]})
        self.bar.tell(shown)
        self._open_window()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log(trainer, _scores(trainer))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        epoch = self.epoch
        self.images += epoch["images"]
        self.step_seconds += epoch["seconds"]
        now = time.perf_counter()
        self.train_seconds += now - self._started
        self._started = now
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/loss": epoch["loss"] / epoch["images"],
            "train/acc": epoch["right"] / epoch["images"],
            **_scores(trainer),
            "images_per_second": epoch["images"] / epoch["seconds"],
            "seconds": round(self.train_seconds, 3),
        }
        self.rows.append(row)
        if trainer.is_global_zero:
            self._write_rows()
        self.bar.epoch_ended(trainer, row)

    def _write_rows(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, [c for c in COLUMNS if any(c in row for row in self.rows)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.metrics_csv, text.getvalue())

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.bar.stop()

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "images": self.images,
            "train_seconds": self.train_seconds,
            "step_seconds": self.step_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _scores(trainer: Trainer) -> dict[str, float]:
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val/", "test/"))}


class Bar:
    """On a terminal, one bar over the whole run; elsewhere, one plain line an epoch."""

    def __init__(self, console: Console, enabled: bool):
        self.progress = None
        self.console, self.enabled = console, enabled
        self.told: dict[str, float] = {}

    def start(self, trainer: Trainer) -> None:
        if not (self.enabled and self.console.is_terminal and trainer.is_global_zero):
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            expand=True,
            refresh_per_second=5,
        )
        self.progress.start()
        batches = int(min(trainer.num_training_batches, sys.maxsize))
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        total = batches * epochs if epochs else None
        if trainer.max_steps > 0:
            steps = trainer.max_steps * trainer.accumulate_grad_batches
            total = min(total, steps) if total else steps
        self.epochs = epochs or (math.ceil(total / batches) if total else None)
        done = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        self.task = self.progress.add_task("epoch", total=total, completed=done, told="")

    def advance(self, trainer: Trainer) -> None:
        if self.progress:
            of = f"/{self.epochs}" if self.epochs else ""
            self.progress.update(self.task, advance=1, description=f"epoch {trainer.current_epoch + 1}{of}")

    def tell(self, values: dict[str, float]) -> None:
        if self.progress:
            self.told |= values
            words = f"loss {self.told['train/loss']:.3f}  acc {self.told['train/acc']:.3f}"
            if "val/acc" in self.told:
                words += f"  val {self.told['val/acc']:.4f}"
            self.progress.update(self.task, told=f"{words}  {self.told['images_per_second']:,.0f} images/s")

    def epoch_ended(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if not (self.enabled and trainer.is_global_zero):
            return
        if self.progress:
            self.tell({k: row[k] for k in ("val/acc",) if k in row})
            return
        of = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        scores = "".join(f"  {k} {row[k]:.4f}" for k in COLUMNS if "/" in k and k in row)
        print(
            f"epoch {row['epoch']}{of}  step {row['step']}{scores}  {row['images_per_second']:,.0f} images/s  "
            f"{row['seconds']:.0f} s",
            flush=True,
        )

    def stop(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None


class Pictures(Callback):
    """For TensorBoard: the network's graph, the test's confusion matrix, a page of wrongly classified test images.

    Args:
        wrong_images: how many of the wrong ones to draw; the first in the files' order.
    """

    def __init__(self, wrong_images: int = 30):
        self.wrong_images = wrong_images

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        size = module.settings.data.image_size
        for logger in _tensorboards(trainer):
            was_training = module.network.training
            logger.experiment.add_graph(module.network.eval(), torch.zeros(1, 1, size, size, device=module.device))
            module.network.train(was_training)

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.wrong: list[tuple[torch.Tensor, int, int]] = []

    def on_test_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        if len(self.wrong) >= self.wrong_images or not _tensorboards(trainer):
            return
        images, labels = batch
        predicted = outputs.argmax(1)
        for i in (predicted != labels).nonzero().flatten().tolist():
            self.wrong.append((images[i, 0].float().cpu(), int(labels[i]), int(predicted[i])))
        del self.wrong[self.wrong_images :]

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        for logger in _tensorboards(trainer):
            step = trainer.global_step
            logger.experiment.add_figure("test/confusion", self._confusion(module), step)
            if self.wrong:
                logger.experiment.add_figure("test/wrong", self._page(), step)

    def _confusion(self, module: LightningModule) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 7.5), layout="constrained")
        axes = figure.subplots()
        module.confusion.plot(ax=axes, labels=list(CLASS_NAMES), cmap="Blues")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        return figure

    def _page(self) -> Any:
        from matplotlib.figure import Figure

        columns = 6
        rows = math.ceil(len(self.wrong) / columns)
        figure = Figure(figsize=(columns * 1.6, rows * 1.9), layout="constrained")
        for axes in figure.subplots(rows, columns, squeeze=False).flat:
            axes.axis("off")
        for axes, (image, label, predicted) in zip(figure.axes, self.wrong, strict=False):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1)
            axes.set_title(f"{CLASS_NAMES[label]}\nnot {CLASS_NAMES[predicted]}", fontsize=8)
        return figure


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
