"""What TensorBoard shows: curves, images, the graph, the request and the result of a run, hyperparameters.

TensorBoard sorts tags by name, and opens on the first ones. So ``train`` and ``val`` have loss and accuracy only;
what else is logged in training is in ``while_training``, and what is logged once, at the end, in ``when_finished``.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from tensorboard.plugins.hparams import summary_v2 as hparams
from torch import Tensor, nn
from torchvision.utils import make_grid

from nin.config.composition import compose_settings
from nin.config.errors import read_first_line
from nin.config.keys import flatten, split_override
from nin.config.schema import Settings, UserError
from nin.networks.score_maps import find_map_kind, forward_with_maps
from nin.runs.console import markdown_table
from nin.training.callbacks.figures import CURVES, Mistake, draw_confusion, draw_curves, draw_wrong
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.classifier import Classifier

log = logging.getLogger(__name__)

# Metrics whose tags are not their names.
_TAGS = {
    "lr": "while_training/lr",
    "images_per_second": "while_training/images_per_second",
    "train/grad_norm": "while_training/grad_norm",
}
# The metrics in the HParams tab.
_FINALS = ("test/acc", "test/loss", "val/acc", "val/loss")
# The keys and sections that may be columns of the HParams tab.
_EXPERIMENT = {
    "seed", "model", "data", "loss", "label_smoothing", "optimizer", "schedule", "trainer", "speed", "compile",
}  # fmt: skip
_PLACES = ("data.root", "data.mirrors")  # the places of files do not change a result


class SingleFileTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger with one event file per process, in ``save_dir`` itself, without ``hparams.yaml``.

    TensorBoard names a run by the folder of its event files, and a resumed run truncates those in its own folder.
    Lightning closes the file after training, and the test would open another one; TensorBoard reads files in the order
    of their names, which contain the time in seconds only.

    Args:
        score_each_epoch: "test" if the test images are scored after every epoch, so that ``test/`` are curves;
            otherwise they are single points of the final test, which ``log_results`` writes.
        arguments: those of Lightning's logger; ``name`` and ``version`` would be folders below ``save_dir``, and are
            ignored.
    """

    def __init__(self, save_dir: str, score_each_epoch: str = "val", **arguments: Any):
        super().__init__(save_dir, **arguments | {"name": "", "version": ""})
        self.has_test_curves = score_each_epoch == "test"

    @property
    def log_dir(self) -> str:
        """``save_dir`` as it is: Lightning replaces ``~`` and ``$`` in it, and would write to another folder."""
        return str(self.save_dir)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Logs scalars at ``step``, except ``epoch``, which Lightning adds, and metrics of the final test.

        ``lr``, ``images_per_second`` and ``train/grad_norm`` are logged in the group ``while_training``.
        """
        scalars = {_TAGS.get(tag, tag): value for tag, value in metrics.items() if tag != "epoch"}
        if not self.has_test_curves:
            scalars = {tag: value for tag, value in scalars.items() if not tag.startswith("test/")}
        super().log_metrics(scalars, step)

    def save(self) -> None:
        """Writes what was logged to disk. The config is in ``.hydra/config.yaml``, and in the Text tab."""
        if self._experiment is not None:
            self._experiment.flush()

    def finalize(self, status: str) -> None:
        self.save()

    def close(self) -> None:
        if self._experiment is not None:
            self._experiment.close()


class ImageLogger(Callback):
    """Logs to TensorBoard: training images, the network's graph, the confusion matrix, wrongly classified images.

    ``while_training/samples`` are the first images of the first batch as the network receives them: resized and
    augmented.

    Args:
        wrong_images: number of wrongly classified test images, the first in the order of the files.
        sample_images: number of training images.
    """

    def __init__(self, wrong_images: int = 30, sample_images: int = 32):
        self.wrong_images, self.sample_images = wrong_images, sample_images
        self.wrong: list[Mistake] = []

    def on_train_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        if trainer.ckpt_path:
            return  # a resumed run has its graph already
        size = pl_module.settings.data.image_size
        for logger in _tensorboard_loggers(trainer):
            weights = next(pl_module.network.parameters())  # with precision=bf16-true they are bfloat16
            shape = (1, pl_module.in_channels, size, size)
            example = torch.zeros(shape, device=weights.device, dtype=weights.dtype)
            try:
                _add_graph(logger, pl_module.network, example)
            except Exception as error:  # noqa: BLE001  # of any kind: a network of the user's own need not be traceable
                reason = read_first_line(error)
                log.warning("TensorBoard has no graph of the network, which can't be traced: %s", reason)
            # torch keeps every trace with its weights: the memory of a sweep's process would grow with every job.
            torch._C._jit_clear_class_registry()  # noqa: SLF001  # there is no public function

    def on_train_batch_start(self, trainer: Trainer, pl_module: Classifier, batch: Any, batch_idx: int) -> None:
        if batch_idx or trainer.global_step or not self.sample_images:
            return
        for logger in _tensorboard_loggers(trainer):
            grid = make_grid(_drawable(batch[0][: self.sample_images]).float().cpu(), nrow=8, pad_value=0.5)
            logger.experiment.add_image("while_training/samples", grid, 0)

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
            self.wrong.append((_drawable(images)[i].float().cpu().numpy(), label, prediction, both))

    def on_test_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        counts = pl_module.confusion.compute().cpu()
        for logger in _tensorboard_loggers(trainer):
            step = trainer.global_step
            _add_figure(logger, "confusion", step, draw_confusion, counts, pl_module.class_names)
            if self.wrong:
                _add_figure(logger, "wrong", step, draw_wrong, self.wrong, pl_module.class_names)


def _add_graph(logger: TensorBoardLogger, network: nn.Module, example: Tensor) -> None:
    """Logs the graph of a copy: torch traces in eval mode, then sets all layers to training mode, also frozen ones."""
    # torch prints the errors that it raises.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # TensorBoard's graphs come from torch.jit.trace, which torch deprecates.
        warnings.filterwarnings("ignore", message="`torch.jit.trace", category=FutureWarning)
        warnings.filterwarnings("ignore", message="`torch.jit.trace", category=DeprecationWarning)
        # The trace is drawn only: it need not hold for other inputs.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        logger.experiment.add_graph(copy.deepcopy(network), example)


def _drawable(images: Tensor) -> Tensor:
    """One channel or three, as TensorBoard and matplotlib draw them: of other images the first three, or the first."""
    return images[:, : 3 if images.shape[1] >= 3 else 1]


def _score_maps(pl_module: Classifier, images: Tensor) -> Tensor | None:
    """Score maps ``(batch, classes, height, width)`` on the CPU, or None for a network that has none."""
    if not len(images) or not find_map_kind(pl_module.network):
        return None
    maps = forward_with_maps(pl_module.network, images)[1]
    if maps is not None and pl_module.settings.data.test_time_flip:  # of both images, as the probabilities
        mirrored = forward_with_maps(pl_module.network, images.flip(-1))[1]
        maps = (maps + mirrored.flip(-1)) / 2  # type: ignore[union-attr]  # it has maps too
    return None if maps is None else maps.float().cpu()


def log_request(trainer: Trainer, settings: Settings, command: str) -> None:
    """Logs what a run is started with: the command and the config as text, and the layout of the custom charts."""
    split = "test" if settings.data.score_each_epoch == "test" else "val"
    # Side by side: a chart has one color per run, so that two curves of a run in one chart would look alike.
    layout = {
        name: {f"{part}/{tag}": ["Multiline", [f"{part}/{tag}"]] for part in ("train", split)}
        for name, tag in CURVES.items()
    }
    config = OmegaConf.to_yaml(OmegaConf.create(settings.model_dump(mode="json")))
    for logger in _tensorboard_loggers(trainer):
        logger.experiment.add_custom_scalars(layout)
        logger.experiment.add_text("command", _code(command), 0)
        logger.experiment.add_text("config", _code(config), 0)


def log_settings(trainer: Trainer, settings: Settings, overrides: list[str]) -> None:
    """Logs the settings to loggers other than TensorBoard's, also when a run is resumed: many begin a new log then."""
    # A sweep may vary options of config groups, as model=nin_small.
    values = hyperparameters(settings, overrides) if settings.sweep.keys else {}
    values |= flatten(settings.model_dump(mode="json"))
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(values)


def _code(text: str) -> str:
    """An indented Markdown code block."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def log_results(trainer: Trainer, settings: Settings, result: dict[str, Any], metrics: MetricsLogger) -> None:
    """Logs to TensorBoard the result as text, and the hyperparameters with the final metrics for its HParams tab.

    The metrics are those of the tested checkpoint: single points in the group ``when_finished``.
    """
    if not trainer.loggers:
        return
    values = hyperparameters(settings, result["overrides"])
    finals = {name: value for name, value in result["metrics"].items() if isinstance(value, float)}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_metrics({f"when_finished/{name}": value for name, value in finals.items()}, result["steps"])
            writer = logger.experiment._get_file_writer()  # noqa: SLF001  # torch's add_hparams adds a run to the list
            if settings.sweep.keys:
                # TensorBoard takes the columns of one run for all. Those of a sweep have the same; for single runs it
                # collects the columns itself.
                shown = [hparams.HParam(name) for name in values]
                metric_columns = [hparams.Metric(f"when_finished/{name}", display_name=name) for name in _FINALS]
                writer.add_summary(hparams.hparams_config_pb(shown, metric_columns))
            writer.add_summary(hparams.hparams_pb(values, trial_id=_run_name(settings, logger)))
            logger.experiment.add_text("result", _table(result), result["steps"])
            if metrics.rows:
                _add_figure(logger, "curves", result["steps"], draw_curves, metrics.rows)
        logger.finalize("success")


def _run_name(settings: Settings, logger: TensorBoardLogger) -> str:
    """The name of the run's folder; for a sweep's job, with that of the sweep."""
    folder = Path(logger.save_dir or settings.name)
    return f"{folder.parent.name}/{folder.name}" if settings.sweep.keys else folder.name


def hyperparameters(settings: Settings, overrides: list[str]) -> dict[str, bool | int | float | str]:
    """The columns of the HParams table: the keys that a sweep varies, else the keys that differ from the defaults."""
    values: dict[str, Any]
    if settings.sweep.keys:  # the same columns in all jobs of a sweep
        given, chosen = dict(map(split_override, overrides)), flatten(settings.model_dump(mode="json"))
        # A config group, as in model=nin, has no value of its own.
        values = {
            key: given[key] if chosen.get(key) is None else chosen[key] for key in settings.sweep.keys if key in given
        }
    else:
        defaults = {}
        with contextlib.suppress(UserError):  # a --config-path may have no train.yaml, or one that is not complete
            defaults = flatten(compose_settings([]).model_dump(mode="json", include=_EXPERIMENT))
        chosen = flatten(settings.model_dump(mode="json", include=_EXPERIMENT))
        values = {k: v for k, v in chosen.items() if k not in _PLACES and v != defaults.get(k)}
        values["seed"] = settings.seed
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}


def _table(result: dict[str, Any]) -> str:
    """``result`` as a Markdown table."""
    rows = flatten({name: value for name, value in result.items() if name not in ("overrides", "command")})
    return "\n".join(markdown_table(["", ""], [(k, _cell(value)) for k, value in rows.items() if value is not None]))


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) and abs(value) < 100 else str(value)


def _add_figure(logger: TensorBoardLogger, name: str, step: int, draw: Callable[..., Figure], *arguments: Any) -> None:
    """Logs what ``draw`` returns. Its error is a warning: a trained and tested network needs no figure."""
    try:
        logger.experiment.add_figure(f"when_finished/{name}", draw(*arguments), step)
    except Exception as error:  # raised by any library that draws
        log.warning("the figure when_finished/%s is missing: %s", name, error, exc_info=error)


def _tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
