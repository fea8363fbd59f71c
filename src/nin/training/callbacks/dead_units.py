"""Dead classes and dead channels: counted while a network trains, and told with what to try."""

import contextlib
import logging
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from nin.data.sources import CLASS_NAMES
from nin.training.callbacks.metrics import MetricsLogger

log = logging.getLogger(__name__)

_CHANCE_LOSS = math.log(len(CLASS_NAMES))


class DeadUnitMonitor(Callback):
    """Counts what a ReLU has silenced, for the loggers: ``units/dead_classes``, ``units/dead_channels/block<n>``.

    A channel is dead if it is zero behind its ReLU at every place of every one of the first ``images`` training images
    (those not held out, in the files' order), without dropout or augmentation; so is a class if its score map is. No
    gradient passes it. Classes are counted in networks that end in one map a class.

    Says once that a class is dead, and once that training sits at chance: when two looks in a row found it.

    Args:
        images: how many are looked at.
        times: how often in an epoch, at equal distances, last at its end, where ``last.ckpt`` is saved; a step in
            between costs nothing.
        patience: how many optimiser steps a run may take before anything is said.
    """

    def __init__(self, images: int = 512, checks_per_epoch: int = 4, patience_steps: int = 200):
        for name, value, least in (
            ("images", images, 1),
            ("checks_per_epoch", checks_per_epoch, 1),
            ("patience_steps", patience_steps, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: must be a whole number, {least} or more")
        self.images, self.checks_per_epoch, self.patience_steps = images, checks_per_epoch, patience_steps
        self.looked_step = 0
        self.suspects: dict[str, Any] = {"dead": [], "chance": False}
        self.told = {"dead": False, "chance": False}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.ckpt_path and trainer.is_global_zero:
            self._look(trainer, module)  # many are dead from the start

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        batches = trainer.num_training_batches
        due = (index + 1) * self.checks_per_epoch // batches > index * self.checks_per_epoch // batches
        ends = trainer.global_step == trainer.max_steps
        # Several batches make one step where gradients are accumulated.
        if not (due or ends) or trainer.global_step == self.looked_step or not trainer.is_global_zero:
            return
        self.looked_step = trainer.global_step
        classes = self._look(trainer, module)
        if trainer.global_step >= self.patience_steps:
            self._tell(trainer, classes)

    def _look(self, trainer: Trainer, module: LightningModule) -> list[int]:
        """Logs the counts; returns the dead classes."""
        channels, classes = dead(module.network, self._sample(trainer, module))
        values: dict[str, float] = {f"units/dead_channels/block{i}": float(n) for i, n in channels.items()}
        if classes is not None:
            values["units/dead_classes"] = float(len(classes))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        log.info("step %d: dead classes: %s; dead channels by block: %s", trainer.global_step, classes, channels)
        return classes or []

    def _sample(self, trainer: Trainer, module: LightningModule) -> Iterator[Tensor]:
        """The images as the network sees them, in batches that fit where the training's do."""
        images = trainer.datamodule.train[0][: self.images]
        for some in images.split(module.micro_batch(module.settings.data.batch_size)):
            yield trainer.datamodule.prepare_images(some)

    def _tell(self, trainer: Trainer, classes: list[int]) -> None:
        latest = next(callback for callback in trainer.callbacks if isinstance(callback, MetricsLogger)).latest
        at_chance = latest.get("train/loss", 0) > 0.98 * _CHANCE_LOSS and latest["train/acc"] < 0.15
        still_dead = [i for i in classes if i in self.suspects["dead"]]
        where = f"step {trainer.global_step} (epoch {trainer.current_epoch + 1})"
        if at_chance and self.suspects["chance"] and not self.told["chance"]:
            self.told["chance"] = True
            log.warning(
                "training sits at chance at %s: the loss is %.4f, and guessing gives ln %d = %.4f.%s %s",
                where, latest["train/loss"], len(CLASS_NAMES), _CHANCE_LOSS, _dead_in_words(classes), _REMEDY,
            )  # fmt: skip
            self.told["dead"] = self.told["dead"] or bool(classes)
        elif still_dead and not self.told["dead"]:
            self.told["dead"] = True
            log.warning("at %s:%s %s", where, _dead_in_words(still_dead), _REMEDY)
        self.suspects = {"dead": classes, "chance": at_chance}

    def state_dict(self) -> dict[str, Any]:
        return {"looked_step": self.looked_step, "suspects": self.suspects, "told": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


_REMEDY = (
    "Try experiment=robust, which starts the same network so that it learns; or one of model.final_relu=false (no "
    "class can die then), model.norm=batch, schedule.warmup=0.1, a smaller optimizer.lr, another seed."
)


def _dead_in_words(classes: list[int]) -> str:
    if not classes:
        return ""
    names = ", ".join(CLASS_NAMES[i] for i in classes)
    verb = "is" if len(classes) == 1 else "are"
    return (
        f" {len(classes)} of {len(CLASS_NAMES)} classes {verb} dead ({names}): the score map, which ends in a ReLU, is "
        "zero everywhere, so that no gradient passes and it is not recognised until the layers below happen to wake it."
    )


@torch.no_grad()
def dead(network: nn.Sequential, batches: Iterator[Tensor]) -> tuple[dict[int, int], list[int] | None]:
    """What ReLUs silence on all of ``batches`` of ``(batch, channels, height, width)`` images together.

    Returns:
        The number of dead channels in each layer of ``network`` that has ReLUs, by its place among them from 1 on,
        all its ReLUs added up; and the dead classes, None if the network does not end in one map a class.
    """
    before = _in_front_of_relus(network)
    largest: dict[nn.Module, Tensor] = {}

    def look(layer: nn.Module, _: Any, maps: Tensor) -> None:
        now = maps.flatten(2).amax(2).amax(0) if maps.ndim == 4 else maps.amax(0)
        largest[layer] = torch.maximum(largest[layer], now) if layer in largest else now

    was_training = network.training
    network.eval()
    with contextlib.ExitStack() as at_the_end:
        for layer in before:
            at_the_end.callback(layer.register_forward_hook(look).remove)
        for images in batches:
            network.forward(images)
    network.train(was_training)

    counts: dict[int, int] = {}
    for layer, block in before.items():
        counts[block] = counts.get(block, 0) + int((largest[layer] <= 0).sum())
    if not isinstance(network[-1], nn.Flatten):
        return counts, None
    last_maps = next(m for m in reversed(list(network.modules())) if isinstance(m, nn.Conv2d | nn.BatchNorm2d))
    silent = (largest[last_maps] <= 0).nonzero().flatten().tolist() if last_maps in before else []
    return counts, silent


def _in_front_of_relus(network: nn.Sequential) -> dict[nn.Module, int]:
    """Each layer whose output a ReLU takes, and the number of the block that it is in."""
    leaves = [(leaf, i) for i, child in enumerate(network) for leaf in _parts(child)]
    # An Identity stands where `speed` has moved a ReLU behind the pooling.
    found = {layer: i for (layer, i), (behind, _) in pairwise(leaves) if isinstance(behind, nn.ReLU | nn.Identity)}
    number = {i: n for n, i in enumerate(dict.fromkeys(found.values()), start=1)}
    return {layer: number[i] for layer, i in found.items()}


def _parts(layer: nn.Module) -> list[nn.Module]:
    return list(layer) if isinstance(layer, nn.Sequential) else [layer]
