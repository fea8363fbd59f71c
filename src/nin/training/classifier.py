"""The LightningModule: loss, metrics, optimizer and learning rate schedule for any of the networks."""

import logging
import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from nin.config import own_classes
from nin.config.networks import OwnModel
from nin.config.schema import TOP5_CLASSES, OwnSchedule, Settings, UserError
from nin.config.trust import require_allowed_classes
from nin.networks import speed
from nin.networks.build import build_network
from nin.system import devices
from nin.training.initialization import start_from_training_images
from nin.training.loss import (
    backward_micro_batches,
    build_loss,
    process_weight,
    require_finite,
    require_finite_weights,
    require_logits,
)
from nin.training.optimizers import build_optimizer, build_schedule, count_steps, follow_validation

log = logging.getLogger(__name__)


class Classifier(LightningModule):
    """Image classifier with a loss on logits, by default cross-entropy: the softmax is in the loss, not in the network.

    ``hparams`` are plain values (``settings``, ``class_names``, ``in_channels``), so that
    ``Classifier.load_from_checkpoint(path)`` rebuilds the network, also with ``weights_only=True``.

    Args:
        settings: the run's settings, or the same as a plain dict, which is validated.
        class_names: one name per class, in the order of the labels.
        in_channels: number of channels of the images.

    Raises:
        pydantic.ValidationError: if a dict has wrong or missing settings.
        UserError: if the network or the loss can't be built, or if the dict of a checkpoint names a class of a module
            that is not imported.
    """

    def __init__(self, settings: Settings | dict[str, Any], class_names: Sequence[str], in_channels: int = 1):
        super().__init__()
        if not isinstance(settings, Settings):
            settings = Settings.model_validate(settings)
            # The dict may be that of a checkpoint, which imports no module but may name a class of an imported one.
            require_allowed_classes(settings, list(sys.modules), remedy="import {0} first")
        self.settings = settings
        self.class_names, self.in_channels = tuple(map(str, class_names)), in_channels  # NumPy's texts become plain
        # Plain values: a checkpoint holds no class. `log_results` logs hyperparameters, with the final metrics.
        plain = {
            "settings": self.settings.model_dump(),
            "class_names": list(self.class_names),
            "in_channels": in_channels,
        }
        self.save_hyperparameters(plain, logger=False)
        self.loss = build_loss(self.settings, self.class_names)
        # Accumulated on the device, and read once per logging interval or epoch. torchmetrics' check for NaN would
        # synchronize a GPU in every update; without it 1.9 ignores weights too: `update` is given one loss per image.
        self.train_loss, self.train_acc, self.eval_loss = (MeanMetric(nan_strategy="disable") for _ in range(3))
        self.eval_acc = self._accuracy()  # in training, which updates its metrics in every step, a mean is faster
        self.top5_acc = self._accuracy(top_k=5) if self.num_classes > TOP5_CLASSES else None
        # Checkpoints are also saved between two loggings: what was accumulated since the last one is part of the state.
        self.train_loss.persistent(True)
        self.train_acc.persistent(True)
        self.confusion = MulticlassConfusionMatrix(self.num_classes, validate_args=False)
        self.network = build_network(self.settings, in_channels, self.num_classes)
        self.micro_batch_size, self.dropouts = speed.optimize(self.network, self.settings, in_channels)
        self.evaluations = 0  # of the batch, in one step of the optimizer
        # Set by `MetricsLogger` where the loggers already have test metrics at this step; each tag has a step once.
        self.test_metrics_logged = False

    @property
    def num_classes(self) -> int:
        """The number of classes, and of logits."""
        return len(self.class_names)

    def _accuracy(self, top_k: int = 1) -> MulticlassAccuracy:
        """The fraction of all images that are classified correctly."""
        return MulticlassAccuracy(self.num_classes, top_k=top_k, average="micro", validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of images ``(batch, channels, image_size, image_size)`` from 0 to 1."""
        return self.network(images)

    def setup(self, stage: str) -> None:
        model = self.settings.model
        # A network of the user's own may have an argument of that name.
        has_components = (
            not isinstance(model, OwnModel) and model.init == "kaiming_dirac_pca" and self.settings.weights is None
        )
        # A resumed run has the weights of its checkpoint, which Lightning loads after this.
        if stage == "fit" and (self.settings.data.normalize or has_components):
            start_from_training_images(self.network, getattr(self.trainer, "datamodule", None), has_components)

    def on_fit_start(self) -> None:
        # With precision=bf16-true the module is bfloat16, in which a sum over many images loses digits.
        for metric in (self.train_loss, self.train_acc, self.eval_loss):
            metric.set_dtype(torch.float32)
        if self.trainer.precision in ("bf16-true", "16-true"):
            self.loss.float()  # as its logits: a loss of the user's own may have buffers, as class weights

    on_validation_start = on_test_start = on_fit_start

    def on_train_start(self) -> None:
        requested, on_gpu = self.settings.compile, self.device.type == "cuda"
        missing = devices.missing_for_compile(self.device) if requested == "auto" and on_gpu else None
        if missing and self.trainer.is_global_zero:
            log.warning("the network is not compiled, and trains more slowly on this GPU: %s", missing)
        if requested is True or (requested == "auto" and on_gpu and not missing):
            # Earlier runs of this process count towards dynamo's limit, above which a network is not compiled.
            torch.compiler.reset()
            # CUDA graphs write the gradients of each batch to the same memory, so that none can be accumulated. A
            # scheduler may accumulate them in later epochs.
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning, missing in its types
            scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
            graphs = on_gpu and self.trainer.accumulate_grad_batches == 1 and not scheduled
            # Compiled in place, so that the names of the weights stay the same.
            self.network.compile(mode="reduce-overhead" if graphs else "default", dynamic=False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss ``()`` for which Lightning calls backward: of the batch, or of its last micro-batch."""
        images, labels = batch
        for dropout in self.dropouts:
            dropout.begin(len(labels), labels.device)
        if (micro_batch := self.micro_batch(len(labels))) < len(labels):
            accumulated = self.trainer.accumulate_grad_batches
            loss, batch_loss, logits = backward_micro_batches(
                self.network, self.loss, images, labels, micro_batch, accumulated
            )
        else:
            # The compiled network has static shapes: those of a full batch.
            full = len(labels) == self.settings.data.batch_size
            logits = self.network(images) if full else self.network.forward(images)
            loss = self.loss(require_logits(logits), labels)
            batch_loss, logits = loss.detach(), logits.detach()
            if self.trainer.world_size > 1 and self.trainer.is_last_batch:
                loss = loss * process_weight(self.trainer.strategy, len(labels), self.device)
        # Reading the loss would synchronize a GPU in every step; there, it is checked when metrics are logged.
        if batch_loss.is_cpu:
            require_finite(self, batch_loss.item())
        if self.evaluations <= 1:  # the metrics are those before the step
            self.train_loss.update(batch_loss.expand(len(labels)))
            self.train_acc.update((logits.argmax(1) == labels).float())
        return loss

    def micro_batch(self, images: int) -> int:
        """The number of images per forward pass, for a batch of ``images``."""
        if self.micro_batch_size and self.device.type == "cpu" and self.trainer.world_size == 1:
            return min(self.micro_batch_size, images)
        return max(images, 1)

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Does nothing: Lightning calls it when micro-batches have gradients already. `optimizer_step` zeroes them."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            self.evaluations += 1
            if self.evaluations > 1:  # an optimizer that evaluates the batch several times for one step, as LBFGS does
                if self.trainer.accumulate_grad_batches > 1:  # the other batches' gradients would be lost
                    several = f"{self.settings.optimizer.name}, which evaluates a batch several times"
                    raise UserError(f"trainer.accumulate_grad_batches: must be 1 with {several}")
                optimizer.zero_grad()
            return optimizer_closure()

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self.evaluations = 0
        optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        require_finite_weights(self)  # before any callback saves them

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._update_eval_metrics(batch)  # the logits, for callbacks

    def on_validation_epoch_end(self) -> None:
        is_run = self.trainer.state.fn != TrainerFn.VALIDATING  # there `MetricsLogger` logs them, by optimizer steps
        self._log(self._compute_eval_metrics(self.settings.data.score_each_epoch), is_logged=not is_run)

    def on_test_epoch_start(self) -> None:
        self.confusion.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Updates the test metrics and returns the logits ``(batch, classes)`` for callbacks."""
        logits = self._update_eval_metrics(batch)
        self.confusion.update(logits, batch[1])
        if self.top5_acc is not None and len(batch[1]):
            self.top5_acc.update(logits, batch[1])
        return logits

    def on_test_epoch_end(self) -> None:
        metrics = self._compute_eval_metrics("test")
        if self.top5_acc is not None:
            metrics["test/top5_acc"] = self.top5_acc.compute()
            self.top5_acc.reset()
        # Lightning logs at this step; its own count of batches is one too high after some resumes.
        if self.trainer.global_step:  # after training
            metrics["step"] = torch.tensor(float(self.trainer.global_step), device=self.device)
        self._log(metrics, is_logged=not self.test_metrics_logged)
        # compute() synchronizes all processes, so it runs while all are in this hook. torchmetrics caches the value,
        # which `evaluation.test` reads.
        self.confusion.compute()

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        """Class probabilities ``(batch, classes)``.

        Args:
            batch: float images ``(batch, channels, image_size, image_size)``, or a tuple of images and labels.
        """
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self._predict_in_micro_batches(images).float().softmax(1)

    def _update_eval_metrics(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = self._predict_in_micro_batches(images)
        if not len(labels):  # in the last batch of several processes, if it has fewer images than processes
            return logits
        self.eval_loss.update(functional.cross_entropy(require_logits(logits), labels, reduction="none"))
        self.eval_acc.update(logits, labels)
        return logits

    def _predict_in_micro_batches(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            raise TypeError(
                f"the images are {tuple(images.shape)}, uint8, as the data module stores them; give the data module to "
                "the Trainer, which then scales and resizes them (trainer.predict(module, data)), or float images "
                "(batch, channels, height, width) from 0 to 1"
            )
        parts = images.split(self.micro_batch(len(images)))
        return torch.cat([self.predict_logits(part) for part in parts])

    def predict_logits(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` for validation, test and prediction.

        With ``data.test_time_flip`` they are the logarithms of the mean of two probabilities: those of the images and
        those of the mirrored images.
        """
        if not self.settings.data.test_time_flip:
            return self.network.forward(images)
        # Computed first, because a network of the user's own may change its input.
        mirrored = self.network.forward(images.flip(-1))
        both = torch.stack([self.network.forward(images), mirrored]).float()
        return both.log_softmax(-1).logsumexp(0) - math.log(2)

    def _compute_eval_metrics(self, split: str) -> dict[str, Tensor]:
        """Loss and accuracy of all processes; resets the metrics."""
        metrics = {f"{split}/loss": self.eval_loss.compute(), f"{split}/acc": self.eval_acc.compute()}
        self.eval_loss.reset()
        self.eval_acc.reset()
        return metrics

    def _log(self, metrics: dict[str, Tensor], is_logged: bool) -> None:
        """Hands the metrics of all processes to callbacks and, if ``is_logged``, to loggers."""
        with warnings.catch_warnings():
            # `Trainer.validate` and `Trainer.test` return what is logged with logger=True, also if there is no logger.
            warnings.filterwarnings("ignore", message="You called `self.log")
            self.log_dict(metrics, logger=is_logged, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.settings, self.network.parameters(), self.device)
        schedule = self.settings.schedule
        if schedule.is_constant:
            return optimizer
        if isinstance(schedule, OwnSchedule):
            counted = [name for name, value in schedule.arguments.items() if value == "steps"]
            schedule = schedule.model_copy(update={name: count_steps(self.trainer, self.settings) for name in counted})
            scheduler = own_classes.build("schedule", schedule, LRScheduler, optimizer)
            if isinstance(scheduler, ReduceLROnPlateau):
                return {"optimizer": optimizer, "lr_scheduler": follow_validation(scheduler, self.settings)}
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": schedule.interval}}
        scheduler = build_schedule(optimizer, schedule, count_steps(self.trainer, self.settings))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
