"""Reads the metrics while training, and writes them to the loggers and to ``metrics.csv``."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from nin.config.schema import UserError
from nin.runs.files import write_atomically
from nin.training.callbacks.loops import is_stopping
from nin.training.classifier import Classifier
from nin.training.loss import require_finite

COLUMNS = (
    "epoch", "step", "lr", "train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc",
    "images_per_second", "seconds",
)  # fmt: skip
_SCORES = [name for name in COLUMNS if name.startswith(("val/", "test/"))]
# The attributes that are saved as they are; `state_dict` computes the durations.
_STATE = (
    "latest", "logged_step", "scored_step", "rows", "epoch", "scores", "lr", "window_images", "images", "step_seconds",
)  # fmt: skip


class MetricsLogger(Callback):
    """Logs the training metrics every ``log_every_n_steps`` steps, the validation metrics after each validation.

    Everything is logged at the number of optimizer steps so far, so that all curves have the same x axis. The value of
    ``lr`` and ``train/grad_norm`` at step k are those of the k-th optimizer step; the norm is that before clipping.
    ``metrics.csv`` has one row per epoch.

    Not by ``self.log``: Lightning logs at its own count of batches, which is one too high after some resumes, and a
    checkpoint that is saved within an epoch lacks its sums.

    Args:
        metrics_csv: path of the CSV file.
    """

    def __init__(self, metrics_csv: Path):
        self.metrics_csv = metrics_csv
        self.latest: dict[str, float] = {}
        self.logged_step = self.scored_step = 0
        self.rows: list[dict[str, Any]] = []
        self.epoch: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        self.lr = 0.0
        self.grad_norm: tuple[int, Tensor] | None = None
        # The window is the time since the last logging.
        self.window_images, self.window_seconds = 0, 0.0
        self.images = self.train_seconds = self.step_seconds = 0.0
        self.validation_started: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        self.started = time.perf_counter() - self.train_seconds
        self._open_window(self.window_images, self.window_seconds)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        self.epoch = {"images": 0, "seconds": 0.0, "loss": 0.0, "right": 0.0}
        self.scores = {}  # Lightning's callback_metrics keep those of the last validation, also in epochs without one
        self._open_window()

    def _open_window(self, images: int = 0, seconds: float = 0.0) -> None:
        self.window_images, self.window_started = images, time.perf_counter() - seconds

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Classifier, optimizer: Optimizer) -> None:
        # Read before the step, because after it the schedule has already set the learning rate of the next one.
        self.lr = float(optimizer.param_groups[0]["lr"])
        step = trainer.global_step + 1
        if trainer.loggers and _is_logged(trainer, step):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norm = get_total_norm(gradients)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler and getattr(optimizer, "_step_supports_amp_scaling", False):
                norm = norm / scaler.get_scale()  # a fused optimizer does so itself, in its step
            self.grad_norm = step, norm  # a tensor: read only when the metrics are logged

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Classifier, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.window_images += len(batch[1])
        step = trainer.global_step
        due = _is_logged(trainer, step) or is_stopping(trainer)
        # With gradient accumulation several batches have the same step.
        if due and step != self.logged_step:
            self._close_window(trainer, pl_module)

    def _close_window(self, trainer: Trainer, pl_module: Classifier) -> None:
        values = self.read_window(trainer, pl_module)
        require_finite(pl_module, values["train/loss"])
        pl_module.train_loss.reset()
        pl_module.train_acc.reset()
        # Summed over all processes, which may have different numbers of images in the last batch of an epoch.
        own = torch.tensor(float(self.window_images), device=pl_module.device)
        images = int(trainer.strategy.reduce(own, reduce_op="sum"))
        self.epoch["images"] += images
        self.epoch["seconds"] += time.perf_counter() - self.window_started
        self.epoch["loss"] += images * values["train/loss"]
        self.epoch["right"] += images * values["train/acc"]
        if trainer.global_step != self.logged_step:
            values["lr"] = self.lr
            if self.grad_norm and self.grad_norm[0] == trainer.global_step:
                values["train/grad_norm"] = float(self.grad_norm[1])
            self._log(trainer, values)
        self.logged_step = trainer.global_step
        self._open_window()

    def read_window(self, trainer: Trainer, pl_module: Classifier) -> dict[str, float]:
        """The training metrics since the last logging, of all processes. On a GPU this waits for its kernels."""
        metrics = {
            "train/loss": float(pl_module.train_loss.compute()),
            "train/acc": float(pl_module.train_acc.compute()),
        }
        # Read after the values, for which a GPU first has to compute.
        seconds = time.perf_counter() - self.window_started
        return metrics | {"images_per_second": self.window_images * trainer.world_size / seconds}

    def on_validation_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        self.validation_started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        started, self.validation_started = self.validation_started, None
        if started and not trainer.sanity_checking:
            # The time of a validation in the middle of an epoch does not count as training time.
            self._open_window(self.window_images, started - self.window_started)
            # Metrics of the user's own callbacks are left out: they have any name, and may be missing in some epochs.
            names = [name for name in _SCORES if name in trainer.callback_metrics]
            self.scores = rounded({name: trainer.callback_metrics[name] for name in names})
            self.scored_step = trainer.global_step
            self._log(trainer, self.scores)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        if self.window_images:
            self._close_window(trainer, pl_module)  # trainer.max_time ended the epoch after `on_train_batch_end`
        epoch = self.epoch
        if not epoch["images"]:
            raise UserError(
                f"data: its train_dataloader() gave no batch in epoch {trainer.current_epoch + 1}; it must start again "
                "in each epoch"
            )
        self.images += epoch["images"]
        self.step_seconds += epoch["seconds"]
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": self.lr,
            "train/loss": round(epoch["loss"] / epoch["images"], 7),
            "train/acc": round(epoch["right"] / epoch["images"], 7),
            # Those of a validation in the middle of the epoch are of other weights.
            **(self.scores if self.scored_step == trainer.global_step else {}),
            "images_per_second": round(epoch["images"] / epoch["seconds"], 1),
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        self.rows.append(row)
        self.train_seconds = time.perf_counter() - self.started
        if trainer.is_global_zero:
            self._write_rows()

    def on_fit_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        if trainer.is_global_zero and self.rows and not self.metrics_csv.exists():  # it was removed; no step was left
            self._write_rows()

    def on_test_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        # With data.score_each_epoch=test the curves already have test metrics at this step.
        pl_module.test_metrics_logged = "test/acc" in self.scores and self.scored_step == trainer.global_step

    def _write_rows(self) -> None:
        text = io.StringIO()
        columns = [column for column in COLUMNS if any(column in row for row in self.rows)]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.metrics_csv, text.getvalue())

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        self.latest |= values
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        now = time.perf_counter()
        return {name: getattr(self, name) for name in _STATE} | {
            # The time of a validation that is under way does not count.
            "window_seconds": (self.validation_started or now) - self.window_started,
            "train_seconds": now - self.started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the sums, and the metrics of the last validation."""
        for name in (*_STATE, "window_seconds", "train_seconds"):  # no others: not the path of the CSV file
            setattr(self, name, state_dict[name])


def rounded(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Scalars ``()`` as plain numbers, rounded to seven decimals: 0.9127, not 0.9127000570297241."""
    return {name: round(float(value), 7) for name, value in metrics.items()}


def _is_logged(trainer: Trainer, step: int) -> bool:
    """Whether metrics are logged at ``step``: every ``log_every_n_steps``, at the end of an epoch or of the run."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning, missing in its types
    return step % every == 0 or step == trainer.max_steps or trainer.is_last_batch
