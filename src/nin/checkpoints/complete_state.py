"""Whether a checkpoint has all state of the loops, the optimizer and the schedule of the run that resumes from it."""

from typing import Any

import torch
from lightning import Trainer

from nin.config.networks import OwnModel
from nin.config.schema import SGD, OwnClass, Settings

# The parts of the fit loop's state that count; the others are positions of dataloaders.
_COUNTED = ("progress", "epoch_loop.state_dict")


def require_complete_state(trainer: Trainer, settings: Settings, checkpoint: dict[str, Any]) -> None:
    """Checks that a checkpoint has all counters of the loops, and the whole state of the project's own optimizers and
    schedules.

    Raises:
        TypeError: names what is missing or of another type.
    """
    (optimizer,) = trainer.optimizers
    counters = {key: part for key, part in trainer.fit_loop.state_dict().items() if key.endswith(_COUNTED)}
    saved_counters = {key: checkpoint["loops"]["fit_loop"].get(key) for key in counters}
    if describe_structure(saved_counters) != describe_structure(counters):
        raise TypeError("the counters of the loops differ")
    if isinstance(settings.optimizer, OwnClass) or isinstance(settings.schedule, OwnClass):
        return
    saved, fresh = checkpoint["optimizer_states"][0], optimizer.state_dict()
    if describe_structure(saved["param_groups"]) != describe_structure(fresh["param_groups"]):
        raise TypeError("param_groups of the optimizer differ")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if not isinstance(settings.optimizer, SGD) or settings.optimizer.momentum:  # SGD without momentum has no state
        with_state = sorted(saved["state"])
        # A network of the user's own may have frozen or unused weights, which have no state.
        known = isinstance(settings.model, OwnModel) and set(with_state) <= set(range(len(weights)))
        if not known and with_state != list(range(len(weights))):
            raise TypeError("the optimizer's state is not that of all weights")
        for i, state in saved["state"].items():
            weight = weights[i]
            shapes = {name: value.shape for name, value in state.items()}
            if not shapes or shapes.keys() != saved["state"][with_state[0]].keys():
                raise TypeError("the optimizer's state lacks a part")
            if any(shape not in ((), weight.shape) for shape in shapes.values()):
                raise TypeError("the optimizer's state is that of other weights")
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    if describe_structure(checkpoint["lr_schedulers"]) != describe_structure(schedulers):
        raise TypeError("the state of the schedule lacks a part, or has one of another type")


def describe_structure(value: Any) -> Any:
    """The keys, lengths, types and shapes in ``value``; integers and floats are alike, and so are lists and tuples."""
    if isinstance(value, dict):
        return {key: describe_structure(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [describe_structure(part) for part in value]
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    return "number" if type(value) in (int, float) else type(value).__name__
