"""What a person sees while it runs: on a terminal a bar, elsewhere one plain line an epoch."""

import math
import os
import sys
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nin.training.callbacks.metrics import COLUMNS, MetricsLogger


class TrainingProgressBar(Callback):
    """One bar over the whole training, and a second one while images are score.

    Args:
        watch: whose latest metrics are shown.
        label: stands before every line where other runs print beside this one; there are no bars then.
    """

    def __init__(self, watch: MetricsLogger, label: str = ""):
        self.watch, self.label = watch, label
        self.console = Console()
        self.progress: Progress | None = None
        self.training: TaskID | None = None
        self.scoring: TaskID | None = None
        self.told = 0.0

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self.label or not (self.console.is_terminal and trainer.is_global_zero):
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            expand=True,
            refresh_per_second=5,
        )
        self.progress.start()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.progress:
            batches, epochs = trainer.num_training_batches, trainer.max_epochs or -1
            total = batches * epochs if epochs > 0 else math.inf
            if trainer.max_steps > 0:
                total = min(total, trainer.max_steps * trainer.accumulate_grad_batches)
            done = trainer.fit_loop.epoch_loop.batch_progress.total.completed
            self.epochs = f"/{math.ceil(total / batches)}" if total < math.inf else ""
            total = total if total < math.inf else None
            self.training = self.progress.add_task("training", total=total, completed=done, told="")

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.progress:
            epoch = f"epoch {trainer.current_epoch + 1}{self.epochs}"
            self.progress.update(self.training, advance=1, description=epoch)
            # Once a second: reading the metrics makes a GPU wait.
            if (now := time.monotonic()) > self.told + 1 and self.watch.window_images:
                self.told = now
                # Where there are several processes all would have to read them at once: it shows what was last logged.
                so_far = self.watch.window_so_far(trainer, module) if trainer.world_size == 1 else {}
                self.progress.update(self.training, told=_in_words(self.watch.latest | so_far))

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start_scoring("validating", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start_scoring("testing", trainer.num_test_batches)

    def _start_scoring(self, name: str, batches: list[int | float]) -> None:
        if self.progress:
            self.scoring = self.progress.add_task(name, total=sum(batches), told="")

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.progress:
            self.progress.advance(self.scoring)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, *_: Any) -> None:
        if self.progress:
            self.progress.remove_task(self.scoring)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        row = self.watch.rows[-1]
        if self.progress:
            self.progress.update(self.training, told=_in_words(self.watch.latest))
        elif trainer.is_global_zero:
            of = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
            scores = "".join(f"  {name} {row[name]:.4f}" for name in COLUMNS if "/" in name and name in row)
            rate = f"{row['images_per_second']:,.0f} images/s  {row['seconds']:.0f} s"
            try:
                print(f"{self.label}epoch {row['epoch']}{of}  step {row['step']}{scores}  {rate}", flush=True)
            except BrokenPipeError:  # `| head` has prepare_images enough, `| tee` had the Ctrl-C first; the run goes on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "")


def _in_words(latest: dict[str, float]) -> str:
    words = [f"{short} {latest[name]:.4f}" for short, name in _SHORT.items() if name in latest]
    if "images_per_second" in latest:
        words.append(f"{latest['images_per_second']:,.0f} images/s")
    return "  ".join(words)


_SHORT = {"loss": "train/loss", "acc": "train/acc", "val": "val/acc", "test": "test/acc"}
