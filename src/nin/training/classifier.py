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
from nin.config.schema import Settings
from nin.data.sources import CLASS_NAMES
from nin.networks import speed


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
        self.network = networks.build(settings, in_channels=1, num_classes=len(CLASS_NAMES))
        self.micro_batch_size = self._make_fast(settings)
        # Accumulated on the device and read once a logging interval or once an epoch.
        # A NaN ends the run; asking for it in every update would cost as much as the update. Without that question
        # torchmetrics 1.9 takes no weights either: each image's loss is given, or each image the mean of all.
        self.train_loss, self.score_loss = (MeanMetric(nan_strategy="disable") for _ in range(2))
        self.train_acc, self.score_acc = accuracy(), accuracy()
        # What the batches since the last logging gave is part of the state: checkpoints are saved in between, too.
        self.train_loss.persistent(True)
        self.train_acc.persistent(True)
        self.confusion = MulticlassConfusionMatrix(len(CLASS_NAMES), validate_args=False)

    def _make_fast(self, settings: Settings) -> int | None:
        """How many images are worked through at a time on a CPU; None keeps batches whole."""
        chosen = settings.speed
        shapes = speed.output_shapes(self.network, in_channels=1, image_size=settings.data.image_size)
        piece = speed.micro_batch_size(self.network, shapes)
        if piece and chosen.micro_batch != "auto":
            piece = chosen.micro_batch
        self.dropouts = speed.replace_dropout(self.network, shapes)
        if chosen.relu_after_pooling:
            speed.move_relu_after_pooling(self.network)
        if chosen.channels_last:
            self.network.to(memory_format=torch.channels_last)
        return piece

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, 1, image_size, image_size)``, 0 to 1, to logits ``(batch, 10)``."""
        return self.network(images)

    def on_fit_start(self) -> None:
        # Where all of the module is bfloat16 or float16 (precision=bf16-true) sums of many images need more digits.
        for metric in (self.train_loss, self.score_loss):
            metric.set_dtype(torch.float32)

    on_test_start = on_fit_start

    def on_train_start(self) -> None:
        asked, on_gpu = self.settings.compile, self.device.type == "cuda"
        if asked is True or (asked == "auto" and on_gpu):
            # In place: the names of the weights stay as they are. On a GPU with CUDA graphs.
            self.network.compile(mode="reduce-overhead" if on_gpu else "default", dynamic=False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        for dropout in self.dropouts:
            dropout.begin(len(labels), labels.device)
        if (micro_batch := self.micro_batch(len(labels))) < len(labels):
            loss, whole_loss, logits = self._loss_in_pieces(images, labels, micro_batch)
        else:
            # Only whole batches are of the size that a compiled network is compiled for.
            whole = len(labels) == self.settings.data.batch_size
            logits = self.network(images) if whole else self.network.forward(images)
            loss = functional.cross_entropy(logits, labels)
            whole_loss, logits = loss.detach(), logits.detach()
            if self.trainer.world_size > 1 and self.trainer.is_last_batch:
                loss = loss * self._share(len(labels))
        # A read-back would hold up a GPU at every step; there, `require_finite` is called when metrics are read.
        if not whole_loss.is_cuda:
            self.require_finite(whole_loss.item())
        self.train_loss.update(whole_loss.expand(len(labels)))
        self.train_acc.update(logits, labels)
        return loss

    def micro_batch(self, images: int) -> int:
        """How many of a batch's images are worked through at a time."""
        if self.micro_batch_size and self.device.type == "cpu" and self.trainer.world_size == 1:
            return min(self.micro_batch_size, images)
        return max(images, 1)

    def _loss_in_pieces(self, images: Tensor, labels: Tensor, micro_batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Adds up the gradients of all micro_batch but the last, whose loss Lightning is left to work backward from.

        Returns the last piece's share of the loss, the whole batch's loss, and its logits.
        """
        shares, logits = [], []
        for some_images, some_labels in zip(images.split(micro_batch), labels.split(micro_batch), strict=True):
            if shares:
                (shares[-1] / self.trainer.accumulate_grad_batches).backward()
                shares[-1] = shares[-1].detach()
            score = self.network(some_images)
            # Each image weighs the same, in a last piece that is not full too.
            shares.append(functional.cross_entropy(score, some_labels) * (len(some_labels) / len(labels)))
            logits.append(score.detach())
        return shares[-1], torch.stack([share.detach() for share in shares]).sum(), torch.cat(logits)

    def _share(self, images: int) -> Tensor:
        """What this process's mean loss must be weighted by, where the last batch could not be divided equally."""
        mean = self.trainer.strategy.reduce(torch.tensor(float(images), device=self.device), reduce_op="mean")
        return images / mean

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Lightning would do it between a batch's first micro_batch and its last; see `optimizer_step`."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

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

    def metrics_so_far(self) -> dict[str, Tensor]:
        """The part of the state that the batches since the last logging left in this process, on the CPU."""
        state = self.state_dict()
        return {name: state[name].cpu() for name in state if name.startswith(("train_loss.", "train_acc."))}

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
        self.confusion.compute()  # of all processes, as long as they can ask each other; it keeps what it found

    def _score(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = torch.cat([self.score(piece) for piece in images.split(self.micro_batch(len(labels)))])
        if not len(labels):  # the last batch, where there are fewer images than processes
            return logits
        self.score_loss.update(functional.cross_entropy(logits, labels, reduction="none"))
        self.score_acc.update(logits, labels)
        return logits

    def score(self, images: Tensor) -> Tensor:
        """Logits ``(batch, 10)`` as they are score: with ``data.test_time_flip`` those of mirrored images count."""
        logits = self.network.forward(images)
        if not self.settings.data.test_time_flip:
            return logits
        both = torch.stack([logits, self.network.forward(images.flip(-1))]).float()
        return both.log_softmax(-1).logsumexp(0) - math.log(2)  # of the mean of both probabilities

    def _log_scores(self, part: str) -> None:
        scores = {f"{part}/loss": self.score_loss.compute(), f"{part}/acc": self.score_acc.compute()}
        # For callbacks; `MetricsLogger` writes them to the loggers, at this very step. They are of all processes already.
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
        # Lightning clips no gradients in mixed precision where the optimiser is fused.
        clipped = self.settings.trainer.gradient_clip_val is not None
        fused = self.settings.speed.fused_optimizer and self.device.type in ("cpu", "cuda") and not clipped
        return kind(self.network.parameters(), **chosen, fused=fused)


def accuracy() -> MulticlassAccuracy:
    """Share of all images that are classified rightly."""
    return MulticlassAccuracy(len(CLASS_NAMES), average="micro", validate_args=False)


def rounded(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Plain numbers, with the seven digits that a float32 has: 0.9127, not 0.9127000570297241."""
    return {name: round(float(value), 7) for name, value in metrics.items()}


def schedule(optimizer: torch.optim.Optimizer, chosen: Any, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over ``steps`` optimiser steps; ``chosen.warmup`` is the share in which it climbs."""
    from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR

    if chosen.name == "one_cycle":
        group = optimizer.param_groups[0]
        # Three: it divides by the steps of the climb, and by those of the descent, but one.
        steps = max(3, steps)
        return OneCycleLR(
            optimizer,
            max_lr=group["lr"],
            total_steps=steps,
            pct_start=max(chosen.warmup, 2 / steps),
            **_momentum_cycle(group["momentum"] if "momentum" in group else group["betas"][0]),
        )
    warmup = round(chosen.warmup * steps)
    rest = (
        CosineAnnealingLR(optimizer, max(1, steps - warmup)) if chosen.name == "cosine" else ConstantLR(optimizer, 1.0)
    )
    if not warmup:
        return rest
    climb = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    return SequentialLR(optimizer, [climb, rest], milestones=[warmup])


def _momentum_cycle(momentum: float) -> dict[str, Any]:
    """Down from 0.05 above ``momentum`` to 0.05 below it and up again: around 0.9 it is torch's and Smith's own."""
    if not momentum:
        return {"cycle_momentum": False}
    swing = min(0.05, momentum, round((1 - momentum) / 2, 6))
    return {"max_momentum": round(momentum + swing, 6), "base_momentum": round(momentum - swing, 6)}
