"""The loss of a batch: cross-entropy or the user's own, in micro-batches, weighted among processes, and finite."""

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from nin.config import own_classes
from nin.config.errors import locate_in_own_code
from nin.config.schema import Schedule, Settings, UserError


class NonFiniteLossError(RuntimeError):
    """The loss or a weight is NaN or infinite: the message names the step, the learning rate and what to try."""


def require_known_loss(settings: Settings) -> None:
    """Checks what is known of the loss before the data are, so that no job of a sweep starts with a wrong one.

    Raises:
        UserError: if the user's own class can't be imported or lacks an argument, or there is ``label_smoothing`` too.
    """
    if settings.loss is None:
        return
    if settings.label_smoothing:
        raise UserError(
            f"label_smoothing={settings.label_smoothing:g}: is for the cross-entropy alone; set label_smoothing=0 with "
            f"{settings.loss.target}"
        )
    own_classes.import_class("loss", settings.loss, nn.Module)


def build_loss(settings: Settings, class_names: Sequence[str]) -> nn.Module:
    """The loss of logits ``(batch, classes)`` and labels ``(batch,)``: cross-entropy, or a module of the user's own.

    Raises:
        UserError: if the user's own can't be built, has weights to train, does not compute a mean loss, or there is a
            ``label_smoothing`` too.
    """
    require_known_loss(settings)
    if settings.loss is None:
        return nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    names = list(class_names)
    loss = own_classes.build("loss", settings.loss, nn.Module, num_classes=len(names), class_names=names)
    if any(weights.requires_grad for weights in loss.parameters()):
        raise UserError(f"loss: {settings.loss.target} has weights of its own, which would not be trained")
    _require_mean_loss(loss, settings.loss.target, len(names))
    return loss


def _require_mean_loss(loss: nn.Module, target: str, classes: int) -> None:
    """Computes a copy of ``loss``; raises UserError if it makes no single number of logits and labels, one without a
    gradient, or a sum over the images.
    """
    labels = torch.arange(2 * classes + 1) % classes

    def compute(labels: Tensor) -> Any:
        with torch.enable_grad(), isolate_rng(), warnings.catch_warnings(action="ignore"):
            logits = torch.zeros(len(labels), classes, requires_grad=True).clone()  # a loss may change them in place
            return copy.deepcopy(loss)(logits, labels)

    try:
        output = compute(labels)
    except Exception as error:
        shapes = f"logits {(len(labels), classes)} and int64 labels {(len(labels),)}"
        reason = f"{type(error).__name__}: {error}{locate_in_own_code(error)}"
        raise UserError(f"loss: {target} fails with {shapes}: {reason}") from error
    if not isinstance(output, Tensor) or output.dim():
        found = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"loss: its class returns {found}, and not the mean loss of the batch as a tensor of shape ()")
    if not output.requires_grad:
        raise UserError(
            f"loss: {target} returns a value without a gradient, so that nothing could be trained: compute it from the "
            "logits without argmax, comparisons, .detach() and .item()"
        )
    if output and torch.isclose(compute(labels.repeat(2)), 2 * output):
        raise UserError(
            f"loss: {target} doubles with twice the images: it is the sum of the batch, so that the best learning rate "
            "would depend on data.batch_size; return the mean"
        )


def backward_micro_batches(
    network: nn.Module, loss: nn.Module, images: Tensor, labels: Tensor, size: int, accumulated: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulates the gradients of all micro-batches but the last, for which Lightning calls backward.

    Args:
        loss: the mean loss of logits and labels.
        images, labels: of the batch, ``(batch, channels, height, width)`` and ``(batch,)``.
        size: images per micro-batch.
        accumulated: batches whose gradients are accumulated for one optimizer step (``accumulate_grad_batches``).

    Returns:
        The loss of the last micro-batch, weighted by its share of the batch, and the mean loss of the batch, both
        ``()``; the logits ``(batch, classes)``.
    """
    losses: list[Tensor] = []
    logits = []
    for micro_images, micro_labels in zip(images.split(size), labels.split(size), strict=True):
        if losses:
            (losses[-1] / accumulated).backward()
            losses[-1] = losses[-1].detach()
        output = network(micro_images)
        # Every image has the same weight, also where the last micro-batch is smaller.
        mean = loss(require_logits(output), micro_labels)
        losses.append(mean * (len(micro_labels) / len(labels)))
        logits.append(output.detach())
    return losses[-1], torch.stack([part.detach() for part in losses]).sum(), torch.cat(logits)


def require_logits(output: Any) -> Tensor:
    """Returns the output of a network in training mode, in float32 or more, if it is logits alone.

    With ``precision=bf16-true`` the loss would otherwise have the three digits of bfloat16.

    Raises:
        UserError: if a network of the user's own returns more.
    """
    if not isinstance(output, Tensor):
        found = f"the network returns {type(output).__name__} in training, and not logits alone"
        raise UserError(f"model: {found}; turn off what it adds, as aux_logits=false")
    return output.to(torch.promote_types(output.dtype, torch.float32))


def process_weight(strategy: Strategy, images: int, device: torch.device) -> Tensor:
    """The weight ``()`` of this process's mean loss where a batch is not divided equally among processes.

    DDP averages gradients over processes; weighted by ``images`` of this process divided by the mean number per
    process, the average is the gradient of the mean loss over all images of the batch.
    """
    return images / strategy.reduce(torch.tensor(float(images), device=device), reduce_op="mean")


def require_finite(module: LightningModule, loss: float) -> None:
    """Raises NonFiniteLossError if ``loss`` is NaN or infinite."""
    if not math.isfinite(loss):
        raise _diverged(module, f"the loss is {loss}")


def require_finite_weights(module: LightningModule) -> None:
    """Raises NonFiniteLossError if a parameter has a value that is NaN or infinite, as after too large a step."""
    for name, weights in module.named_parameters():
        if not bool(weights.isfinite().all()):
            raise _diverged(module, f"{name} has values that are NaN or infinite")


def _diverged(module: LightningModule, what: str) -> NonFiniteLossError:
    lr, settings = module.trainer.optimizers[0].param_groups[0]["lr"], cast(Settings, module.settings)
    return NonFiniteLossError(
        f"{what} at step {module.global_step} (epoch {module.current_epoch + 1}), learning rate {lr:g}: training "
        f"diverged. Try {', '.join(_remedies(settings))}"
    )


def _remedies(settings: Settings) -> list[str]:
    """Lists settings that may keep training from diverging, without those that the run has already."""
    remedies = ["a smaller optimizer.lr"]
    if isinstance(settings.schedule, Schedule) and settings.schedule.warmup < 0.1:
        remedies.append("schedule.warmup=0.1")
    if not settings.trainer.gradient_clip_val:
        remedies.append("trainer.gradient_clip_val=1")
    if getattr(settings.model, "norm", None) == "none":
        remedies.append("model.norm=batch")
    return remedies
