"""Dead classes and dead channels: counted while a network trains, with a warning that names what to try."""

import contextlib
import logging
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor, nn

from nin.config.networks import OwnModel
from nin.config.schema import FolderData, OwnData
from nin.networks.sequential import list_layers
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.classifier import Classifier

log = logging.getLogger(__name__)

_NAMES = 10  # so many dead classes are named in a warning
_REMEDY = (
    "Try experiment=robust, which starts the same network so that it learns; or one of model.final_relu=false (then no "
    "class can be dead), model.norm=batch, schedule.warmup=0.1, a smaller optimizer.lr, another seed."
)
_REMEDY_OF_OTHERS = "Try one of schedule.warmup=0.1, a smaller optimizer.lr, optimizer=adamw, another seed."


class DeadUnitMonitor(Callback):
    """Counts dead classes and channels: ``zero_units/dead_classes``, ``zero_units/dead_channels/block<n>``.

    TensorBoard sorts groups of curves by name: these come after ``train`` and ``val``.

    A channel is dead if the output of its ReLU is zero at every position of every image of a sample: the first
    ``images`` training images (not held out, in the order of the files; with ``data=folder``, whose files are sorted by
    class, as many at equal distances), in eval mode (without dropout and augmentation). A class is dead if its score
    map is. On such a sample no gradient reaches the layers below through that channel. Other images, augmentation,
    dropout or changes of the layers below can make it active again: classes that were dead at one check have been
    active at a later one. Not counted is a class whose map is zero for its own images and not for others, which is
    never predicted either: a run warns of it after its test. Classes are counted in networks whose last layers are one
    score map per class.

    Warns once that classes are dead, and once that training is at the loss of guessing, if two checks in a row find it.

    Args:
        images: size of the sample.
        checks_per_epoch: number of checks per epoch, at equal distances, the last one at its end.
        patience_steps: a warning needs two checks in a row at this optimizer step or later.
    """

    def __init__(self, images: int = 512, checks_per_epoch: int = 4, patience_steps: int = 200):
        self.images, self.checks_per_epoch, self.patience_steps = images, checks_per_epoch, patience_steps
        self.checked_step = 0
        self.suspects: dict[str, Any] = {"dead": [], "chance": False}
        self.warned = {"dead": False, "chance": False}

    def on_train_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        if not trainer.ckpt_path and trainer.is_global_zero:
            self._check(trainer, pl_module)  # with many initializations classes are dead from the start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Classifier, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batches = trainer.num_training_batches
        if batches == math.inf:  # the data module does not know their number
            return
        due = (batch_idx + 1) * self.checks_per_epoch // batches > batch_idx * self.checks_per_epoch // batches
        is_last = trainer.global_step == trainer.max_steps
        # With gradient accumulation several batches have the same step.
        if not (due or is_last) or trainer.global_step == self.checked_step or not trainer.is_global_zero:
            return
        self.checked_step = trainer.global_step
        classes = self._check(trainer, pl_module)
        if trainer.global_step >= self.patience_steps:
            self._warn(trainer, pl_module, classes)

    def _check(self, trainer: Trainer, pl_module: Classifier) -> list[int]:
        """Logs the counts; returns the labels of the dead classes."""
        if isinstance(pl_module.settings.data, OwnData) or isinstance(pl_module.settings.model, OwnModel):
            return []  # their images and layers are unknown
        with trainer.precision_plugin.forward_context():
            channels, classes = count_dead(pl_module.network, self._sample(trainer, pl_module))
        values: dict[str, float] = {f"zero_units/dead_channels/block{i}": float(n) for i, n in channels.items()}
        if classes is not None:
            values["zero_units/dead_classes"] = float(len(classes))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        log.info("step %d: dead classes: %s; dead channels by block: %s", trainer.global_step, classes, channels)
        return classes or []

    def _sample(self, trainer: Trainer, pl_module: Classifier) -> Iterator[Tensor]:
        """The images of the sample as the network receives them, in batches or micro-batches like those of training."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, missing in its types
        of_folder = isinstance(pl_module.settings.data, FolderData)
        sample = data.train[0][data.spread(self.images) if of_folder else slice(self.images)]
        # Not more at once than in training: a GPU may not have the memory.
        size = min(pl_module.micro_batch(self.images), pl_module.settings.data.batch_size)
        for images in sample.to(pl_module.device).split(size):
            yield data.transform_images(images)

    def _warn(self, trainer: Trainer, pl_module: Classifier, classes: list[int]) -> None:
        latest = next(c for c in trainer.callbacks if isinstance(c, MetricsLogger)).latest  # type: ignore[attr-defined]
        has_own_loss = pl_module.settings.loss is not None
        chance = is_at_chance(latest, pl_module.num_classes, has_own_loss)
        still_dead = [i for i in classes if i in self.suspects["dead"]]
        # `_REMEDY` names keys that only NiN has.
        remedy = _REMEDY if hasattr(pl_module.settings.model, "final_relu") else _REMEDY_OF_OTHERS
        # The number of images that `_sample` takes. A data module of the user's own, whose classes are not counted, has
        # no ``train``.
        images = min(self.images, len(trainer.datamodule.train[1])) if classes else 0  # type: ignore[attr-defined]
        where = f"step {trainer.global_step} (epoch {trainer.current_epoch + 1})"
        if chance and self.suspects["chance"] and not self.warned["chance"]:
            self.warned["chance"] = True
            n, reason = pl_module.num_classes, f"train/acc is {latest['train/acc']:.4f}"
            if not has_own_loss:
                chances = f"equal probabilities for all classes give ln {n} = {math.log(n):.4f}"
                reason = f"train/loss is {latest['train/loss']:.4f}, and {chances}"
            log.warning(
                "after %s the network does no better than guessing: %s.%s %s",
                where, reason, _describe(classes, pl_module.class_names, images), remedy,
            )  # fmt: skip
            self.warned["dead"] = self.warned["dead"] or bool(classes)
        elif still_dead and not self.warned["dead"]:
            self.warned["dead"] = True
            log.warning("at %s:%s %s", where, _describe(still_dead, pl_module.class_names, images), remedy)
        self.suspects = {"dead": classes, "chance": chance}

    def state_dict(self) -> dict[str, Any]:
        return {"checked_step": self.checked_step, "suspects": self.suspects, "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self.state_dict():  # no others: a checkpoint may come from elsewhere
            setattr(self, name, state_dict[name])


def _describe(classes: list[int], class_names: tuple[str, ...], images: int) -> str:
    if not classes:
        return ""
    names = ", ".join(class_names[i] for i in classes[:_NAMES])
    more = f" and {len(classes) - _NAMES} more" if len(classes) > _NAMES else ""
    verb = "is" if len(classes) == 1 else "are"
    return (
        f" {len(classes)} of {len(class_names)} classes {verb} dead on these {images} training images, in "
        f"eval mode ({names}{more}): the score map, which ends in a ReLU, is zero everywhere, so that these images "
        "give it no gradient. A dead class can become active again when the layers below change."
    )


def is_at_chance(latest: dict[str, float], num_classes: int, has_own_loss: bool = False) -> bool:
    """Whether the training metrics are those of guessing: a loss above 0.98 ln n, an accuracy below 1.5/n.

    Args:
        has_own_loss: whether the loss is one of the user's own, which may have any scale: it is not compared.
    """
    high_loss = has_own_loss or latest.get("train/loss", 0) > 0.98 * math.log(num_classes)
    return high_loss and latest.get("train/acc", 1) < 1.5 / num_classes


@torch.no_grad()
def count_dead(network: nn.Sequential, batches: Iterator[Tensor]) -> tuple[dict[int, int], list[int] | None]:
    """Finds the channels whose ReLU is zero for all images of all ``batches``.

    Runs the network in eval mode, and restores the mode of each of its parts.

    Args:
        batches: each ``(batch, channels, height, width)``.

    Returns:
        The number of dead channels in each child of ``network`` with ReLUs, numbered from 1, added up over its ReLUs;
        and the labels of the dead classes, None if the network does not end in one score map per class.
    """
    before = _layers_before_relus(network)
    largest: dict[nn.Module, Tensor] = {}

    def update_largest(layer: nn.Module, _: Any, maps: Tensor) -> None:
        # torch's `amax` takes three times as long on bfloat16.
        batch = maps.movedim(1, -1).flatten(0, -2).max(0).values  # (channels,)
        largest[layer] = torch.maximum(largest[layer], batch) if layer in largest else batch

    training = [part for part in network.modules() if part.training]
    network.eval()
    with contextlib.ExitStack() as cleanup:
        for layer in before:
            cleanup.callback(layer.register_forward_hook(update_largest).remove)
        for images in batches:
            network.forward(images)
    for part in training:
        part.training = True

    counts: dict[int, int] = {}
    for layer, block in before.items():
        counts[block] = counts.get(block, 0) + int((largest[layer] <= 0).sum())
    if not isinstance(list(network)[-1], nn.Flatten):
        return counts, None
    kinds = nn.Conv2d | nn.BatchNorm2d | nn.SyncBatchNorm
    last_maps = next(module for module in reversed(list(network.modules())) if isinstance(module, kinds))
    dead = (largest[last_maps] <= 0).nonzero().flatten().tolist() if last_maps in before else []
    return counts, dead


def _layers_before_relus(network: nn.Sequential) -> dict[nn.Module, int]:
    """Each layer whose output is the input of a ReLU, and the number of its block."""
    leaves = [(leaf, i) for i, child in enumerate(network) for leaf in list_layers(child)]
    # `speed.move_relu_after_pooling` leaves an Identity in the place of the ReLU.
    found = {
        layer: i
        for (layer, i), (after, _) in pairwise(leaves)
        if isinstance(after, nn.ReLU | nn.Identity) and not isinstance(layer, nn.MaxPool2d)
    }
    number = {i: n for n, i in enumerate(dict.fromkeys(found.values()), start=1)}
    return {layer: number[i] for layer, i in found.items()}
