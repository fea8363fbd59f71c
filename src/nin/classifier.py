"""The LightningModule: loss, metrics, optimiser and schedule around any of the networks."""

import math
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from nin import networks
from nin.networks import NUM_CLASSES
from nin.settings import Settings


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite: the message names the step, the learning rate and what to try."""


class Classifier(LightningModule):
    """Cross-entropy on logits: softmax is in the loss, not in the network.

    ``hparams`` are the run's settings as plain values; with them a checkpoint rebuilds its own network.
    """

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings
        # Plain values: a checkpoint holds no class. They reach the loggers at the end, with the real final metrics.
        self.save_hyperparameters(settings.model_dump(mode="json"), logger=False)
        # The layout that convolutions are fastest in, on CPUs and GPUs; values and shapes stay the same.
        self.network = networks.build(settings).to(memory_format=torch.channels_last)
        # Accumulated on the device and read once a logging interval or once an epoch.
        self.train_loss, self.score_loss = MeanMetric(), MeanMetric()
        self.train_acc, self.score_acc = accuracy(), accuracy()
        # What the batches since the last logging gave rides in checkpoints, which are saved between loggings too.
        self.train_loss.persistent(True)
        self.train_acc.persistent(True)
        self.confusion = MulticlassConfusionMatrix(NUM_CLASSES, validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, 1, image_size, image_size)``, 0 to 1, to logits ``(batch, 10)``."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = functional.cross_entropy(logits, labels)
        # A read-back would hold up a GPU at every step; there, `require_finite` is called when metrics are read.
        if not loss.is_cuda:
            self.require_finite(loss.item())
        self.train_loss.update(loss.detach(), len(labels))
        self.train_acc.update(logits.detach(), labels)
        return loss

    def require_finite(self, loss: float) -> None:
        """Raises NonFiniteLossError if ``loss`` is NaN or infinite."""
        if math.isfinite(loss):
            return
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        raise NonFiniteLossError(
            f"the loss is {loss} at step {self.global_step} (epoch {self.current_epoch}), learning rate {lr:g}: "
            "the weights ran away. Try a smaller optimizer.lr, schedule.warmup=0.1, trainer.gradient_clip_val=1, or "
            "model.norm=batch"
        )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._score(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_scores(self.settings.data.score_each_epoch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits, for whoever draws them."""
        logits = self._score(batch)
        self.confusion.update(logits, batch[1])
        return logits

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _score(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = self(images)
        if not len(labels):  # the last batch, where there are fewer images than processes
            return logits
        self.score_loss.update(functional.cross_entropy(logits, labels), len(labels))
        self.score_acc.update(logits, labels)
        return logits

    def _log_scores(self, part: str) -> None:
        scores = {f"{part}/loss": self.score_loss.compute(), f"{part}/acc": self.score_acc.compute()}
        # For callbacks; `Watch` writes them to the loggers, at this very step. They are of all processes already.
        self.log_dict(scores, logger=False, sync_dist=True)
        self.score_loss.reset()
        self.score_acc.reset()

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer()
        chosen = self.settings.schedule
        if chosen.name == "constant" and not chosen.warmup:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule(optimizer, chosen, steps), "interval": "step"},
        }

    def _optimizer(self) -> torch.optim.Optimizer:
        chosen = self.settings.optimizer.model_dump(exclude={"name"})
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.settings.optimizer.name]
        return kind(self.network.parameters(), **chosen)


def accuracy() -> MulticlassAccuracy:
    """Share of all images that are classified rightly."""
    return MulticlassAccuracy(NUM_CLASSES, average="micro", validate_args=False)


def rounded(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Plain numbers, with the seven digits that a float32 has: 0.9127, not 0.9127000570297241."""
    return {name: round(float(value), 7) for name, value in metrics.items()}


def schedule(optimizer: torch.optim.Optimizer, chosen: Any, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over ``steps`` optimiser steps; ``chosen.warmup`` is the share in which it climbs."""
    from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR

    if chosen.name == "one_cycle":
        lr = optimizer.param_groups[0]["lr"]
        # It divides by the steps of the climb but one.
        steps = max(2, steps)
        return OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=max(chosen.warmup, 2 / steps))
    warmup = round(chosen.warmup * steps)
    rest = (
        CosineAnnealingLR(optimizer, max(1, steps - warmup)) if chosen.name == "cosine" else ConstantLR(optimizer, 1.0)
    )
    if not warmup:
        return rest
    climb = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    return SequentialLR(optimizer, [climb, rest], milestones=[warmup])
