"""The progress of a run: a bar on a terminal, elsewhere one line per epoch; warnings if training is slow."""

import logging
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nin.config.data_sets import IDX_FORMAT
from nin.system.devices import cpu_has_bfloat16
from nin.training.callbacks.metrics import COLUMNS, MetricsLogger
from nin.training.classifier import Classifier

log = logging.getLogger(__name__)

# The names in the bar, and the metrics that they stand for.
_SHORT = {"loss": "train/loss", "acc": "train/acc", "val": "val/acc", "test": "test/acc"}


class TrainingProgressBar(Callback):
    """Draws, on a terminal, one bar for the training of all epochs, and a second one during validation and test.

    Lightning's RichProgressBar is not used: it has a new bar for each epoch, and shows only what ``self.log`` has
    logged, but `MetricsLogger` computes the training metrics. This one writes to ``sys.stdout``, which
    `nin.runs.console` makes tolerant of closed pipes, full disks and encodings without some character.

    Args:
        metrics: the callback whose latest metrics are shown while training; a test alone needs none.
    """

    def __init__(self, metrics: MetricsLogger | None = None):
        self.metrics = metrics
        self.console = Console()
        self.progress = Progress(disable=True)  # draws nothing
        self.training = self.evaluation = TaskID(0)
        self.epochs = ""
        self.updated_at = -math.inf

    def setup(self, trainer: Trainer, pl_module: Classifier, stage: str) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            expand=True,
            refresh_per_second=5,
            disable=not trainer.is_global_zero,
        )
        self.progress.start()

    def on_train_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        total, done = count_progress(trainer)
        epochs = math.ceil(total / trainer.num_training_batches) if 0 < total < math.inf else 0
        self.epochs = f"/{epochs}" if epochs else ""
        self.training = self.progress.add_task(
            "training", total=total if total < math.inf else None, completed=done, metrics="first batch"
        )
        # The start of the first batch is a sample for rich's estimate, which so exists after that batch.
        self.progress.advance(self.training, 0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:
        epoch = f"epoch {trainer.current_epoch + 1}{self.epochs}"
        self.progress.update(self.training, advance=1, description=epoch)
        # Updated once a second, because reading the metrics synchronizes a GPU.
        now = time.monotonic()
        if self.metrics and self.metrics.window_images and now > self.updated_at + 1:
            self.updated_at = now
            # Several processes would have to read them at the same time: those that were logged last are shown.
            current = self.metrics.read_window(trainer, pl_module) if trainer.world_size == 1 else {}
            self.progress.update(self.training, metrics=_format(self.metrics.latest | current))

    def on_validation_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        self._start_evaluation("validating", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        self._start_evaluation("testing", trainer.num_test_batches)

    def _start_evaluation(self, name: str, batches: list[int | float]) -> None:
        total = sum(batches)
        self.evaluation = self.progress.add_task(name, total=total if total < math.inf else None, metrics="")

    def on_validation_batch_end(self, *_: Any) -> None:
        self.progress.advance(self.evaluation)

    def on_test_batch_end(self, *_: Any) -> None:
        self.on_validation_batch_end()

    def on_validation_end(self, *_: Any) -> None:
        self.progress.remove_task(self.evaluation)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        if self.metrics:
            self.progress.update(self.training, metrics=_format(self.metrics.latest))

    def teardown(self, trainer: Trainer, pl_module: Classifier, stage: str) -> None:
        self.progress.stop()
        self.progress.disable = True  # where TERM=dumb rich prints an empty line at every stop

    def on_exception(self, trainer: Trainer, pl_module: Classifier, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")


def count_progress(trainer: Trainer) -> tuple[float, int]:
    """The number of training batches of the run in all, infinity if it has no limit; and of those that are done."""
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or -1
    total = batches * epochs if epochs > 0 else math.inf
    if trainer.max_steps > 0:
        total = min(total, trainer.max_steps * trainer.accumulate_grad_batches)
    # `completed` would be one less after resuming within an epoch; see `rewrite_loop_state`.
    return total, trainer.fit_loop.epoch_loop.batch_progress.total.ready


def _format(latest: dict[str, float]) -> str:
    words = [f"{short} {latest[name]:.4f}" for short, name in _SHORT.items() if name in latest]
    if "images_per_second" in latest:
        words.append(f"{latest['images_per_second']:,.0f} images/s")
    return "  ".join(words)


@dataclass
class EpochPrinter(Callback):
    """Prints one line per epoch, where there is no terminal for a bar.

    Args:
        metrics: the callback whose last row is printed.
        label: a prefix of every line, where several runs print at the same time.
    """

    metrics: MetricsLogger
    label: str = ""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        if not trainer.is_global_zero:
            return
        row = self.metrics.rows[-1]
        total = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        metrics = "".join(f"  {name} {row[name]:.4f}" for name in COLUMNS if "/" in name and name in row)
        rate = f"{row['images_per_second']:,.0f} images/s  {row['seconds']:.0f} s"
        print(f"{self.label}epoch {row['epoch']}{total}  step {row['step']}{metrics}  {rate}", flush=True)


@dataclass
class SlowTrainingWarner(Callback):
    """Warns once, on a CPU, if training will take more than an hour, or if its threads get too few CPU cores.

    Args:
        sample_seconds: of training, from which both are estimated. The first batch, which is slower, does not count.
    """

    sample_seconds: float = 10.0
    started: float | None = None
    cpu_started: float = 0.0
    batches: int = 0
    is_done: bool = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:
        if self.is_done:
            return
        if self.started is None:
            self.started, self.cpu_started = time.monotonic(), time.process_time()
            return
        self.batches += 1
        seconds = time.monotonic() - self.started
        if seconds < self.sample_seconds:
            return
        self.is_done = True
        if pl_module.device.type != "cpu" or not trainer.is_global_zero:
            return
        total, done = count_progress(trainer)
        hours = (total - done) * seconds / self.batches / 3600
        if 1 < hours < math.inf:
            log.warning("about %s of training left on this CPU. %s", _format_hours(hours), _advise(trainer, pl_module))
        _warn_of_few_cores((time.process_time() - self.cpu_started) / seconds)


def _warn_of_few_cores(used: float) -> None:
    """Warns if this process got less than 0.8 CPU cores per thread.

    torch's threads wait for each other in a loop, so that they use their cores completely: 0.97 of two cores were
    measured, and 0.63 beside one busy program.
    """
    threads = torch.get_num_threads()
    if threads > 1 and used < 0.8 * threads and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        # The cause is another program, or a container with fewer cores than the machine has.
        log.warning(
            "training gets %.1f CPU cores for its %d threads, which wait for each other: other programs seem to run. "
            "To go faster, stop it and resume with threads=%d: its result is then not the same to the bit.",
            used, threads, max(1, int(used)),
        )  # fmt: skip


def _format_hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours < 10 else f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def _advise(trainer: Trainer, pl_module: Classifier) -> str:
    data = pl_module.settings.data
    faster = "a smaller data.image_size trains faster, and so does model=nin_small"
    if data.name in IDX_FORMAT:
        size = " at their own size, 28x28," if data.image_size > 28 else ""
        faster = f"experiment=cpu trains a small network on the same images{size} in minutes"
    if trainer.precision == "32-true" and cpu_has_bfloat16():
        faster += "; trainer.precision=auto uses the native bfloat16 of this CPU, about 1.7 times as fast"
    return f"{faster}; a GPU is used where there is one (trainer=auto, the default)."
