"""Which keys may change when a run is resumed; any other change would make it another experiment."""

import json
from collections.abc import Mapping
from typing import Any

from nin.config.keys import flatten, is_within
from nin.config.schema import OwnData, OwnSchedule, Schedule, Settings, UserError

# The keys that may be overridden when a run is resumed.
MAY_CHANGE = (
    "name",
    "resume",
    "threads",
    "data.root",
    "data.mirrors",
    "data.cache",
    "data.memory_limit_mib",
    "speed",
    "compile",
    "checkpoint",
    "sweep",
    "logger",
    "callbacks",
    *(
        f"trainer.{key}"
        for key in (
            "accelerator", "strategy", "devices", "num_nodes", "precision", "deterministic", "benchmark", "profiler",
            "detect_anomaly", "inference_mode", "enable_progress_bar", "enable_model_summary", "log_every_n_steps",
            "max_epochs", "num_sanity_val_steps",
        )
    ),
)  # fmt: skip


# MAY_CHANGE without trainer.max_epochs: a resumed run may be extended, but a new run with another max_epochs is another
# experiment.
SAME_EXPERIMENT = tuple(key for key in MAY_CHANGE if key != "trainer.max_epochs")
# Keys that may change on resuming and still affect the result: a sweep's table has one row per value.
PART_OF_RESULT = ("trainer.max_epochs", "trainer.precision", "callbacks", "data.root")


# Lightning's callbacks that do not change training, as those of this project. Any other is part of the experiment: an
# average of the weights, early stopping, and those of the user, which may do anything.
_OBSERVERS = (
    "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "RichModelSummary",
    "RichProgressBar", "ThroughputMonitor", "TQDMProgressBar",
)  # fmt: skip


def changes_training(callback: Mapping[str, Any]) -> bool:
    """Whether a run with this entry of ``callbacks`` may train otherwise than one without it."""
    module, _, name = str(callback.get("_target_")).rpartition(".")
    return not is_within(module, ["nin"]) and not (is_within(module, ["lightning"]) and name in _OBSERVERS)


def select_training_callbacks(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of ``callbacks`` that are part of the experiment; in a file they may be of any type."""
    return {k: entry for k, entry in callbacks.items() if isinstance(entry, Mapping) and changes_training(entry)}


def depends_on_steps(schedule: Schedule | OwnSchedule) -> bool:
    """Whether the learning rate of every step depends on the number of steps of the whole run."""
    if isinstance(schedule, OwnSchedule):
        return "steps" in schedule.arguments.values()
    return not schedule.is_constant


def experiment_values(settings: Settings, may_change: tuple[str, ...] = SAME_EXPERIMENT) -> dict[str, Any]:
    """The values that make the experiment what it is, by their keys: all but those of ``may_change``."""
    # A data module of the user's own may do anything with its keys. A loss of the user's own may be another one over
    # parts of a batch.
    fixed = (["data"] if isinstance(settings.data, OwnData) else []) + ["speed.micro_batch"] * bool(settings.loss)
    plain = settings.model_dump(mode="json")
    # An argument {} of a class of the user's own is not the same as none. A sampler's null stands for what the data
    # module needs.
    keys = flatten(plain, keep_empty=True) | {"trainer.use_distributed_sampler": settings.uses_distributed_sampler}
    values = {k: v for k, v in keys.items() if is_within(k, fixed) or not is_within(k, may_change)}
    # `callbacks=none` and `callbacks=ema` are overrides of the same key, and only the second one changes training.
    callbacks = select_training_callbacks(plain["callbacks"])
    return values | flatten(callbacks, "callbacks.", keep_empty=True)


def find_differences(before: Settings, now: Settings) -> list[str]:
    """The keys, with both values, that make ``now`` another experiment than ``before``; none if it may be resumed."""
    # A difference of two schedules has a line of its own.
    has_fixed_length = depends_on_steps(before.schedule) and depends_on_steps(now.schedule)
    may_change = SAME_EXPERIMENT if has_fixed_length else MAY_CHANGE
    # As texts: limit_train_batches=1 is one batch, and 1.0 is all of them.
    there, here = (
        {k: json.dumps(v) for k, v in experiment_values(settings, may_change).items()} for settings in (before, now)
    )
    reasons = {"trainer.max_epochs": f" (schedule={now.schedule.name}: the learning rate of every step depends on it)"}
    return [
        f"{key}: {old} in the existing run, {new} in this command{reasons.get(key, '')}"
        for key in dict.fromkeys([*there, *here])
        if (old := there.get(key, "not given")) != (new := here.get(key, "not given"))
    ]


def require_no_fewer_epochs(requested: int | None, done: int) -> None:
    """Raises UserError if a run that has trained for ``done`` epochs is requested to have fewer.

    Args:
        requested: ``trainer.max_epochs``; -1 and None are no limit.
    """
    if requested not in (-1, None) and done > requested:
        raise UserError(
            f"trainer.max_epochs={requested}: the run has already trained for {done} epochs; give as many or more; a "
            "shorter run needs another name=…"
        )
