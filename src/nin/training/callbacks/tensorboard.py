"""What TensorBoard shows besides curves: images, the graph, the request and the result of a run, hyperparameters."""

import math
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from tensorboard.plugins.hparams import summary_v2 as hparams
from torch import Tensor
from torchvision.utils import make_grid

from nin.config.composition import compose_config
from nin.config.schema import Settings, flat
from nin.data.pictures import blend, draw_image, strongest
from nin.networks.score_maps import forward_with_maps, has_score_maps
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.classifier import Classifier

Mistake = tuple[np.ndarray, int, int, np.ndarray | None]

# The confusion matrix of more classes shows the most confused ones only.
_MATRIX_CLASSES = 30


class SingleFileTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger with one event file per process, and without the curve ``epoch``.

    Lightning closes the file after training, and the test would open another one; TensorBoard reads files in the order
    of their names, which contain the time in seconds only.
    """

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Logs scalars at ``step``, except ``epoch``, which Lightning adds to test metrics."""
        super().log_metrics({tag: value for tag, value in metrics.items() if tag != "epoch"}, step)

    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            self._experiment.flush()

    def close(self) -> None:
        if self._experiment is not None:
            self._experiment.close()


class ImageLogger(Callback):
    """Logs to TensorBoard: training images, the network's graph, the confusion matrix, wrongly classified images.

    ``train/samples`` are the first images of the first batch as the network receives them: resized and augmented.

    Args:
        wrong_images: number of wrongly classified test images, the first in the order of the files.
        sample_images: number of training images.
    """

    def __init__(self, wrong_images: int = 30, sample_images: int = 32):
        for name, value in (("wrong_images", wrong_images), ("sample_images", sample_images)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r}: must be an integer, 0 or more")
        self.wrong_images, self.sample_images = wrong_images, sample_images
        # Image, label, predicted class, and where there are score maps the true and the predicted class's.
        self.wrong: list[Mistake] = []

    def on_train_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        if trainer.ckpt_path:
            return  # a resumed run has its graph already
        size = pl_module.settings.data.image_size
        for logger in _tensorboard_loggers(trainer):
            weights = next(pl_module.network.parameters())  # with precision=bf16-true they are bfloat16
            shape = (1, pl_module.in_channels, size, size)
            example = torch.zeros(shape, device=weights.device, dtype=weights.dtype)
            with warnings.catch_warnings():
                # TensorBoard's graphs come from torch.jit.trace, which torch deprecates.
                warnings.filterwarnings("ignore", message="`torch.jit.trace", category=FutureWarning)
                warnings.filterwarnings("ignore", message="`torch.jit.trace", category=DeprecationWarning)
                logger.experiment.add_graph(pl_module.network.eval(), example)
            # torch keeps every trace with its weights: the memory of a sweep's process would grow with every job.
            torch._C._jit_clear_class_registry()  # noqa: SLF001  # there is no public function
            pl_module.network.train()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Classifier, batch: Any, batch_idx: int) -> None:
        if batch_idx or trainer.global_step or not self.sample_images:
            return
        for logger in _tensorboard_loggers(trainer):
            grid = make_grid(batch[0][: self.sample_images].float().cpu(), nrow=8, pad_value=0.5)
            logger.experiment.add_image("train/samples", grid, 0)

    def on_test_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        self.wrong = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Classifier,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if len(self.wrong) >= self.wrong_images or not _tensorboard_loggers(trainer):
            return
        images, labels = batch
        predicted = outputs.argmax(1)
        wrong = (predicted != labels).nonzero().flatten()[: self.wrong_images - len(self.wrong)]
        maps = _score_maps(pl_module, images[wrong])
        for place, i in enumerate(wrong.tolist()):
            label, prediction = int(labels[i]), int(predicted[i])
            both = maps[place, [label, prediction]].numpy() if maps is not None else None
            self.wrong.append((images[i].float().cpu().numpy(), label, prediction, both))

    def on_test_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        counts = pl_module.confusion.compute().cpu()
        for logger in _tensorboard_loggers(trainer):
            step = trainer.global_step
            logger.experiment.add_figure("test/confusion", _draw_confusion(counts, pl_module.class_names), step)
            if self.wrong:
                logger.experiment.add_figure("test/wrong", _draw_wrong(self.wrong, pl_module.class_names), step)


def most_confused(counts: Tensor, limit: int) -> list[int]:
    """The labels, ascending, of the ``limit`` classes with the most errors, as true and as predicted class.

    Args:
        counts: confusion matrix ``(classes, classes)``; rows are true classes.
    """
    errors = counts - counts.diag().diag()
    order = (errors.sum(0) + errors.sum(1)).argsort(descending=True, stable=True)
    return sorted(order[:limit].tolist())


def _draw_confusion(counts: Tensor, class_names: tuple[str, ...]) -> Figure:
    shown = list(range(len(class_names)))
    title = "test images"
    if len(class_names) > _MATRIX_CLASSES:
        shown = most_confused(counts, _MATRIX_CLASSES)
        title = f"test images: the {_MATRIX_CLASSES} most confused of {len(class_names)} classes"
    side = max(7.5, 0.45 * len(shown))
    figure = Figure(figsize=(side + 0.5, side), layout="constrained")
    axes = figure.subplots()
    part = counts[shown][:, shown].numpy()
    axes.imshow(part, cmap="Blues")
    names = [class_names[i] for i in shown]
    axes.set_xticks(range(len(shown)), names, rotation=90)
    axes.set_yticks(range(len(shown)), names)
    for (row, column), count in np.ndenumerate(part):
        if count:
            color = "white" if count > part.max() / 2 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    return figure


def _score_maps(pl_module: Classifier, images: Tensor) -> Tensor | None:
    """Score maps ``(batch, classes, height, width)`` on the CPU, or None for a network that has none."""
    if not len(images) or not has_score_maps(pl_module.network):
        return None
    return forward_with_maps(pl_module.network, images)[1].float().cpu()


def _draw_wrong(wrong: list[Mistake], class_names: tuple[str, ...]) -> Figure:
    """Each image; where there are score maps, beside it those of the true and the predicted class over it."""
    with_maps = wrong[0][3] is not None
    columns = 3 if with_maps else 6
    rows = math.ceil(len(wrong) / columns)
    figure = Figure(figsize=(columns * (4.4 if with_maps else 1.6), rows * 1.9), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (values, label, predicted, maps) in zip(figure.axes, wrong, strict=False):
        image = (
            (values.transpose(1, 2, 0).clip(0, 1) * 255)
            .round()
            .astype(np.uint8)
            .squeeze(-1 if len(values) == 1 else ())
        )
        if maps is not None:
            limit = strongest(maps)
            image = np.concatenate([blend(image, part, limit) for part in (np.zeros_like(maps[0]), *maps)], axis=1)
        draw_image(axes, image)
        places = (" (middle)", " (right)") if with_maps else ("", "")
        title = f"{class_names[label]}{places[0]}\npredicted: {class_names[predicted]}{places[1]}"
        axes.set_title(title, fontsize=8)
    return figure


def draw_curves(rows: list[dict[str, Any]]) -> Figure:
    """Loss and accuracy over the steps: training dashed, with one point per epoch, validation or test as full lines.

    A custom chart has one color per run; here the curves of one run differ in color, line and legend.

    Args:
        rows: of ``metrics.csv``, one per epoch; the training metrics are means over the epoch.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (name, tag) in zip(figure.subplots(1, 2), _CHARTS.items(), strict=True):
        for split, style in (("train", "--"), ("val", "-"), ("test", "-")):
            points = [(row["step"], row[f"{split}/{tag}"]) for row in rows if f"{split}/{tag}" in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, marker=".", label=f"{split}/{tag}")
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def log_request(trainer: Trainer, settings: Settings, overrides: list[str]) -> None:
    """Logs what a run is started with: the command and the config as text, and the layout of the custom charts."""
    split = "test" if settings.data.score_each_epoch == "test" else "val"
    layout = {
        "train": {name: ["Multiline", [f"train/{tag}"]] for name, tag in _CHARTS.items()},
        split: {name: ["Multiline", [f"{split}/{tag}"]] for name, tag in _CHARTS.items()},
        f"train and {split}": {
            name: ["Multiline", [f"train/{tag}", f"{split}/{tag}"]] for name, tag in _CHARTS.items()
        },
    }
    config = OmegaConf.to_yaml(OmegaConf.create(settings.model_dump(mode="json")))
    for logger in _tensorboard_loggers(trainer):
        logger.experiment.add_custom_scalars(layout)
        logger.experiment.add_text("command", _code(shlex.join(["nin", "train", *overrides])), 0)
        logger.experiment.add_text("config", _code(config), 0)


_CHARTS = {"loss": "loss", "accuracy": "acc"}


def _code(text: str) -> str:
    """An indented Markdown code block."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def log_results(trainer: Trainer, settings: Settings, result: dict[str, Any], metrics: MetricsLogger) -> None:
    """Logs the result as text, and the hyperparameters with the final metrics for TensorBoard's HParams tab.

    Test metrics are curves with one point, which Lightning has logged. The validation metrics of the best checkpoint
    would be single points beside the curves ``val/``; they are columns of the HParams table only.
    """
    values = hyperparameters(settings, result["overrides"])
    best = {f"best {name}": v for name, v in result["metrics"].items() if name.startswith("val/") and v is not None}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            if not trainer.is_global_zero:
                continue
            columns = values | best
            shown = [hparams.HParam(name) for name in columns]
            finals = [hparams.Metric(name) for name in ("test/acc", "test/loss")]
            writer = logger.experiment._get_file_writer()  # noqa: SLF001  # torch's add_hparams adds a run to the list
            writer.add_summary(hparams.hparams_config_pb(shown, finals))
            writer.add_summary(hparams.hparams_pb(columns, trial_id=_run_name(settings, logger)))
            logger.experiment.add_text("result", _table(result), result["steps"])
            if metrics.rows:
                logger.experiment.add_figure("curves", draw_curves(metrics.rows), result["steps"])
        else:
            logger.log_hyperparams(values)
        logger.finalize("success")


def _run_name(settings: Settings, logger: TensorBoardLogger) -> str:
    """The name of the run's folder; for a sweep's job, with that of the sweep."""
    folder = Path(logger.save_dir or settings.name)
    return f"{folder.parent.name}/{folder.name}" if settings.sweep.keys else folder.name


def hyperparameters(settings: Settings, overrides: list[str]) -> dict[str, bool | int | float | str]:
    """The columns of the HParams table: the keys that a sweep varies, else the keys that differ from the defaults."""
    if settings.sweep.keys:  # the same columns in all jobs of a sweep
        given = dict(word.lstrip("+~").partition("=")[::2] for word in overrides)
        # Parsed as Hydra does: 1e-05 is a number.
        values = {key: OmegaConf.from_dotlist([f"_={given[key]}"])._ for key in settings.sweep.keys if key in given}
    else:
        defaults = flat(OmegaConf.to_container(compose_config([])))  # type: ignore[arg-type]  # a config is a dict
        chosen = flat(settings.model_dump(mode="json", include=_EXPERIMENT))
        values = {k: v for k, v in chosen.items() if k not in _PLACES and v != defaults.get(k)}
        values["seed"] = settings.seed
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}


_EXPERIMENT = {"seed", "model", "data", "optimizer", "schedule", "trainer", "speed", "compile"}
_PLACES = ("data.root", "data.mirrors")  # where files are does not change a result


def _table(result: dict[str, Any]) -> str:
    """``result`` as a Markdown table."""
    rows = flat({name: value for name, value in result.items() if name != "overrides"})
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _cell(value: Any) -> str:
    text = f"{value:.4f}" if isinstance(value, float) and abs(value) < 100 else str(value)
    return text.replace("|", "\\|")


def _tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
