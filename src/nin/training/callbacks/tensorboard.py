"""For TensorBoard: a logger with one event file, the graph, the confusion matrix, wrongly classified images."""

import math
import warnings
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from nin.config.schema import Settings, flat
from nin.data.sources import CLASS_NAMES
from nin.training.callbacks.metrics import MetricsLogger


class SingleFileTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger with one event file for the whole of a process's work on a run.

    Lightning closes the file after the training and another one would be begun for the test; TensorBoard reads files
    in the order of their names, which is that of seconds and not finer.
    """

    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            self._experiment.flush()

    def close(self) -> None:
        if self._experiment is not None:
            self._experiment.close()


class ImageLogger(Callback):
    """For TensorBoard: the network's graph, the test's confusion matrix, a page of wrongly classified test images.

    Args:
        wrong_images: how many of the wrong ones to draw; the first in the files' order.
    """

    def __init__(self, wrong_images: int = 30):
        if not isinstance(wrong_images, int) or wrong_images < 0:
            raise ValueError(f"wrong_images={wrong_images!r}: must be a whole number, 0 or more")
        self.wrong_images = wrong_images

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.ckpt_path:
            return  # the graph is in the event files already
        size = module.settings.data.image_size
        for logger in _tensorboards(trainer):
            weights = next(module.network.parameters())  # of half the precision, where that was asked for
            example = torch.zeros(1, 1, size, size, device=weights.device, dtype=weights.dtype)
            with warnings.catch_warnings():
                # TensorBoard's graphs come from torch.jit.trace, which torch wants to replace one day.
                warnings.filterwarnings("ignore", message="`torch.jit.trace", category=FutureWarning)
                warnings.filterwarnings("ignore", message="`torch.jit.trace", category=DeprecationWarning)
                logger.experiment.add_graph(module.network.eval(), example)
            # Traces are kept for ever, weights included: a sweep's process would grow with every job.
            torch._C._jit_clear_class_registry()
            module.network.train()

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.wrong: list[tuple[np.ndarray, int, int]] = []

    def on_test_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        if len(self.wrong) >= self.wrong_images or not _tensorboards(trainer):
            return
        images, labels = batch
        predicted = outputs.argmax(1)
        for i in (predicted != labels).nonzero().flatten().tolist():
            self.wrong.append((images[i, 0].float().cpu().numpy(), int(labels[i]), int(predicted[i])))
        del self.wrong[self.wrong_images :]

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        counts = module.confusion.compute()
        for logger in _tensorboards(trainer):
            step = trainer.global_step
            logger.experiment.add_figure("test/confusion", self._confusion(module, counts), step)
            if self.wrong:
                logger.experiment.add_figure("test/wrong", self._page(), step)

    def _confusion(self, module: LightningModule, counts: Tensor) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 7.5), layout="constrained")
        axes = figure.subplots()
        module.confusion.plot(counts, ax=axes, labels=list(CLASS_NAMES), cmap="Blues")
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
            axes.set_title(f"{CLASS_NAMES[label]}\ntaken for {CLASS_NAMES[predicted]}", fontsize=8)
        return figure


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def log_results(trainer: Trainer, settings: Settings, result: dict[str, Any], watch: MetricsLogger) -> None:
    """The final metrics, and the settings beside them for TensorBoard's HParams tab.

    The metrics of the checkpoint that was tested are logged here and nowhere else, so that no tag has a step twice.
    """
    values = flat(settings.model_dump(include={"seed", "model", "data", "optimizer", "schedule"}))
    values["trainer.max_epochs"] = settings.trainer.max_epochs
    del values["data.root"], values["data.mirrors"]  # where files lie changes nothing
    if settings.sweep.keys:  # the same columns in all of a sweep's jobs, whichever networks they have
        given = dict(word.lstrip("+~").partition("=")[::2] for word in result["overrides"])
        # As Hydra reads them: 1e-05 is a number.
        values = {key: OmegaConf.from_dotlist([f"_={given[key]}"])._ for key in settings.sweep.keys if key in given}
    values = {k: v if isinstance(v, int | float | str) else str(v) for k, v in values.items()}
    final = {
        k if k.startswith("test/") else f"best/{k}": v for k, v in result["metrics"].items() if isinstance(v, float)
    }
    # The notebooks' habit may have the test metrics in the curves already, at this very step.
    logged = watch.scores if watch.scored_step == result["steps"] else {}
    fresh = {k: v for k, v in final.items() if k not in logged}
    for logger in trainer.loggers:
        logger.log_metrics(fresh, step=result["steps"])
        if isinstance(logger, TensorBoardLogger):
            for summary in hparams(values, final):
                logger.experiment._get_file_writer().add_summary(summary)
        else:
            logger.log_hyperparams(values)
        logger.finalize("success")
