"""The optimizers, and the schedules of the learning rate."""

import inspect
import math
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from nin.config import own_classes
from nin.config.schema import SGD, OwnClass, OwnOptimizer, OwnSchedule, Schedule, Settings, UserError

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def build_optimizer(
    settings: Settings, parameters: Iterable[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of ``settings.optimizer``, as one kernel for all weights where torch has one for ``device``.

    Raises:
        UserError: if nothing can be trained.
    """
    parameters = list(parameters)
    if not any(parameter.requires_grad for parameter in parameters):
        raise UserError("model: no parameter of the network has requires_grad, so there is nothing to train")
    if device.type == "cpu":
        # Lightning sets it to 1: Adam and AdamW would load NVIDIA's management library in every step.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    chosen = settings.optimizer
    if isinstance(chosen, OwnOptimizer):
        optimizer = own_classes.build("optimizer", chosen, torch.optim.Optimizer, parameters)
        _keep_types(optimizer)
        return optimizer
    kind, arguments = OPTIMIZERS[chosen.name], chosen.model_dump(exclude={"name"})
    # Lightning can't clip the gradients of a fused optimizer in mixed precision.
    clipped = settings.trainer.gradient_clip_val is not None
    fused = settings.speed.fused_optimizer and device.type in ("cpu", "cuda", "mps") and not clipped
    if "fused" not in inspect.signature(kind).parameters:  # an optimizer that is added to OPTIMIZERS may lack it
        return kind(parameters, **arguments)
    optimizer = kind(parameters, **arguments | {"fused": fused})

    def keep_fused(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        # `fused` is no part of the experiment: that of a checkpoint would replace it, in some parts of the optimizer.
        for group in state["param_groups"]:
            group["fused"] = fused

    optimizer.register_load_state_dict_pre_hook(keep_fused)
    optimizer.register_load_state_dict_post_hook(_match_layout)
    return optimizer


def _keep_types(optimizer: torch.optim.Optimizer) -> None:
    """Makes ``optimizer`` load its state in the types in which it was saved; torch converts it to those of the weights.

    With precision=bf16-true these are bfloat16, in which a state that the optimizer keeps in float32 loses digits.
    """
    saved: dict[int, dict[str, Any]] = {}

    def remember(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        saved.update(state["state"])

    def restore(optimizer: torch.optim.Optimizer) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for i, values in saved.items():
            state = optimizer.state[weights[i]]
            for name, value in values.items():
                if isinstance(value, Tensor) and value.dtype != state[name].dtype:
                    state[name] = value.to(weights[i].device)
        saved.clear()

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(restore)


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Gives the state that was loaded the memory layout of the weights, which ``speed.channels_last`` may change.

    A fused kernel reads weights and state in the order of memory, and of any shape as many numbers as the weight has.

    Raises:
        ValueError: if it is the state of other weights.
    """
    for weight, state in optimizer.state.items():
        for name in state.keys() - {"step"}:
            if state[name].shape != weight.shape:
                raise ValueError("the optimizer's state is that of other weights")
            state[name] = torch.empty_like(weight).copy_(state[name])


def require_restored(trainer: Trainer, settings: Settings) -> None:
    """Raises ValueError if a resumed run lacks a state of its optimizer or its schedule.

    Lightning and torch accept a checkpoint without one, with which both would begin as in a new run. Of those of the
    user's own it is not known whether they have a state.
    """
    if trainer.global_step == 0:  # stopped while the first gradients were accumulated
        return
    chosen = settings.optimizer
    has_state = chosen.momentum > 0 if isinstance(chosen, SGD) else not isinstance(chosen, OwnClass)
    states = trainer.optimizers[0].state.values()
    # With 16-mixed, the scaler of the loss skips the first steps until the gradients are finite.
    if has_state and trainer.precision != "16-mixed" and not (states and all(states)):
        raise ValueError("the state of the optimizer is missing")
    schedulers = [] if isinstance(settings.schedule, OwnClass) else trainer.lr_scheduler_configs
    if any(config.scheduler.last_epoch == 0 for config in schedulers):
        raise ValueError("the state of the schedule is missing")


def require_known_schedule(settings: Settings) -> None:
    """Raises UserError if a schedule of the user's own can't be imported, or does not take its arguments."""
    if isinstance(schedule := settings.schedule, OwnSchedule):
        numbers = {name: 1 for name, value in schedule.arguments.items() if value == "steps"}
        own_classes.import_class("schedule", schedule.model_copy(update=numbers), LRScheduler)


def count_steps(trainer: Trainer, settings: Settings) -> int:
    """The number of optimizer steps of the whole run, which a schedule depends on.

    Raises:
        UserError: if it is not known.
    """
    steps = trainer.estimated_stepping_batches
    if not 1 <= steps < math.inf:  # -1, or infinity, for a loader without a length
        raise UserError(
            f"schedule={settings.schedule.name}: depends on the number of steps, which this data module does not know; "
            "set trainer.max_steps or trainer.limit_train_batches=<number>, or schedule=constant"
        )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning, missing in its types
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    for callback in callbacks:
        # Lightning counts with the first epoch's number of batches per step.
        if isinstance(callback, GradientAccumulationScheduler) and batches < math.inf and epochs and epochs > 0:
            per_step = [callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
            steps = sum(math.ceil(batches / count) for count in per_step)
            steps = min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps
    return int(steps)


def build_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> LRScheduler:
    """The schedule of the learning rate over ``steps`` optimizer steps.

    Args:
        schedule: its name, and ``warmup``: the fraction of the steps in which the learning rate rises linearly to
            ``optimizer.lr`` (``one_cycle``: along a cosine, Smith and Topin 2017).
        steps: with ``one_cycle`` at least 3 are assumed: OneCycleLR divides by the number of steps of both phases.
    """
    if schedule.name == "one_cycle":
        groups = optimizer.param_groups  # an optimizer of the user's own may have several
        steps = max(3, steps)
        return OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in groups],
            total_steps=steps,
            pct_start=max(schedule.warmup, 2 / steps),
            **_momentum_ranges([group.get("momentum") or group.get("betas", (0.0,))[0] for group in groups]),
        )
    warmup = round(schedule.warmup * steps)
    main: LRScheduler = (
        CosineAnnealingLR(optimizer, max(1, steps - warmup))
        if schedule.name == "cosine"
        else ConstantLR(optimizer, 1.0)
    )
    if not warmup:
        return main
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    return SequentialLR(optimizer, [rise, main], milestones=[warmup])


def _momentum_ranges(momenta: list[float]) -> dict[str, Any]:
    """Returns ranges from 0.05 below each of ``momenta`` to 0.05 above it; for 0.9 the defaults of OneCycleLR."""
    if not any(momenta):
        return {"cycle_momentum": False}
    halves = [min(0.05, momentum, round((1 - momentum) / 2, 6)) for momentum in momenta]
    both = list(zip(momenta, halves, strict=True))
    return {
        "max_momentum": [round(momentum + half, 6) for momentum, half in both],
        "base_momentum": [round(momentum - half, 6) for momentum, half in both],
    }


def follow_validation(scheduler: ReduceLROnPlateau, settings: Settings) -> dict[str, Any]:
    """The ``lr_scheduler`` for Lightning of a schedule that `TrainingControl` steps with val/loss after each epoch.

    Raises:
        UserError: if the run does not compute val/loss, or a larger one would count as better.
    """
    if settings.data.score_each_epoch == "test" or settings.trainer.limit_val_batches == 0:
        raise UserError(
            f"schedule={settings.schedule.name}: follows val/loss, which this run does not compute; set "
            "data.score_each_epoch=val and leave trainer.limit_val_batches as it is, or choose another schedule"
        )
    if scheduler.mode != "min":
        raise UserError(f"schedule.mode={scheduler.mode}: the schedule follows val/loss, which is to fall; choose min")
    # Never called by Lightning, which would do so after the checkpoint of the epoch is saved.
    return {"scheduler": scheduler, "interval": "epoch", "frequency": sys.maxsize, "monitor": "val/loss"}
