"""Rules on several keys at once: each is a function that yields a message for each error that it finds.

Whether the arguments of a network fit each other, and whether images are large enough for it, is found by building it
(``networks/build.py``). The number of images is known before any is read for the named data sets only; that of a folder
is checked when it is read.
"""

import math
import re
from collections.abc import Callable, Iterator

from nin.config.changes import depends_on_steps
from nin.config.data_sets import DATA_SETS, Data
from nin.config.errors import did_you_mean
from nin.config.keys import is_within
from nin.config.schema import SGD, Settings, is_single_process
from nin.config.types import OwnClass

_LIMITS = ("trainer.limit_train_batches", "trainer.limit_val_batches", "trainer.limit_test_batches")
# An int is a number of batches, a float is a fraction of all batches.
BATCH_LIMITS = (*_LIMITS, "trainer.limit_predict_batches", "trainer.overfit_batches", "trainer.val_check_interval")

# Lightning's names, without the strategies that `require_separate_processes` refuses.
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
STRATEGIES = (
    "auto", "single_device", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "fsdp",
    "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload",
    "deepspeed_stage_3", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme", "single_tpu", "single_xla",
    "xla", "xla_debug",
)  # fmt: skip
# Strategies that start processes as copies of their own.
_COPIES = "_(spawn|fork|notebook)"

Rule = Callable[[Settings], Iterator[str]]
RULES: list[Rule] = []


def rule(check: Rule) -> Rule:
    """Adds a rule to `RULES`. It ends where it reads a key that has no valid value, which is reported already."""
    RULES.append(check)
    return check


@rule
def require_images_to_train_on(settings: Settings) -> Iterator[str]:
    data = settings.data  # how many images a folder has is known when it is read
    if isinstance(data, Data) and data.val_size >= (images := DATA_SETS[data.name].training_images):
        yield f"data.val_size={data.val_size}: {data.name} has {images} training images; hold out fewer"


@rule
def require_one_full_batch(settings: Settings) -> Iterator[str]:
    data = settings.data
    if (
        isinstance(data, Data)
        and 0 < (images := DATA_SETS[data.name].training_images - data.val_size) < data.batch_size
    ):
        yield (
            f"data.batch_size={data.batch_size}: there are {images} training images"
            f"{f' after {data.val_size} are held out' if data.val_size else ''}; choose at most that"
        )


@rule
def require_images_for_selection(settings: Settings) -> Iterator[str]:
    data = settings.data
    if isinstance(data, Data) and not data.val_size and data.score_each_epoch == "val":
        yield (
            "data.val_size=0: there are no held-out images for choosing the best checkpoint; choose data.val_size=5000 "
            "or data.score_each_epoch=test as in the notebooks (the last epoch's weights are then the best)"
        )


@rule
def require_valid_limits(settings: Settings) -> Iterator[str]:
    """Lightning's convention: an int is a number of batches, a float is a fraction of all batches."""
    for key in BATCH_LIMITS:
        value = getattr(settings.trainer, key.removeprefix("trainer."))
        if isinstance(value, int | float) and (value < 0 or (isinstance(value, float) and value > 1)):
            yield (
                f"{key}={value:g}: must be a number of batches (0, 1, 2, …) or a fraction of all batches (0.0 to 1.0)"
            )


@rule
def require_batches_within_limits(settings: Settings) -> Iterator[str]:
    """Lightning rounds a fraction of the batches down, and refuses 0 batches when training has begun."""
    if not (batches := count_batches(settings)):
        return
    limits = {key: (getattr(settings.trainer, key.removeprefix("trainer.")), batches[key]) for key in _LIMITS}
    limits["trainer.overfit_batches"] = (settings.trainer.overfit_batches, batches["trainer.limit_train_batches"])
    for key, (limit, available) in limits.items():
        if isinstance(limit, float) and limit > 0 and available > 0 and int(available * limit) == 0:
            yield format_empty_fraction(key, limit, available)


def format_empty_fraction(key: str, fraction: float, batches: int) -> str:
    """The message about a ``fraction`` that leaves none of ``batches``, with the smallest one that leaves a batch."""
    smallest = math.ceil(1e4 / batches) / 1e4
    rest = f"choose {smallest:g} or more, or a number of batches, as in 1"
    return f"{key}={fraction:g}: leaves none of {batches} batches; {rest}"


@rule
def require_scoring_within_epochs(settings: Settings) -> Iterator[str]:
    interval = settings.trainer.val_check_interval
    if interval is None or not isinstance(interval, int | float):
        return
    if interval == 0:
        yield (
            "trainer.val_check_interval=0: must be a number of batches (1, 2, …), a fraction of an epoch (above 0.0, "
            "up to 1.0) or null, which is once an epoch; trainer.limit_val_batches=0 turns validation off"
        )
    batches = count_training_batches(settings) if settings.trainer.check_val_every_n_epoch else None
    if isinstance(interval, int) and batches and interval > batches:
        yield (
            f"trainer.val_check_interval={interval}: an epoch has {batches} batches; choose at most that, or set "
            "trainer.check_val_every_n_epoch=null to count the batches of all epochs"
        )


def count_training_batches(settings: Settings) -> int | None:
    """The number of batches in an epoch of training; None where `count_batches` knows none."""
    if not (counted := count_batches(settings)):
        return None
    available, limit = counted["trainer.limit_train_batches"], settings.trainer.limit_train_batches
    if isinstance(limit, float):
        return int(available * limit)
    return available if limit is None else min(available, limit)


def count_batches(settings: Settings) -> dict[str, int]:
    """The number of batches to which each limit applies; empty for several devices, or before a folder is read."""
    data = settings.data
    if not isinstance(data, Data) or not is_single_process(settings.trainer):
        return {}
    training, test = DATA_SETS[data.name].training_images - data.val_size, DATA_SETS[data.name].test_images
    images = (training, test if data.score_each_epoch == "test" else data.val_size, test)
    return {key: math.ceil(max(0, n) / data.batch_size) for key, n in zip(_LIMITS, images, strict=True)}


@rule
def require_an_end_of_training(settings: Settings) -> Iterator[str]:
    trainer, schedule = settings.trainer, settings.schedule
    if trainer.max_epochs not in (-1, None) or trainer.max_steps != -1:
        return
    if depends_on_steps(schedule):
        yield f"schedule={schedule.name}: depends on the number of steps; set trainer.max_epochs or trainer.max_steps"
    elif trainer.max_time is None:
        given = "null" if trainer.max_epochs is None else trainer.max_epochs
        yield f"trainer.max_epochs={given}: training would never end; set it, or trainer.max_steps"


@rule
def require_minimum_below_maximum(settings: Settings) -> Iterator[str]:
    trainer = settings.trainer
    for unit in ("epochs", "steps"):
        least, most = getattr(trainer, f"min_{unit}"), getattr(trainer, f"max_{unit}")
        if least and most not in (-1, None) and least > most:
            yield f"trainer.min_{unit}={least}: must be at most trainer.max_{unit}, which is {most}"


@rule
def require_work_and_results(settings: Settings) -> Iterator[str]:
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(settings.trainer, key) == 0:
            yield f"trainer.{key}=0: nothing would be trained; give 1 or more"
    duration = settings.trainer.max_time
    if isinstance(duration, str) and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", duration.strip()):  # Lightning's rule
        yield f"trainer.max_time={duration}: must be days:hours:minutes:seconds, as in 00:01:30:00"
    elif duration is not None and not re.search("[1-9]", str(duration)):
        yield f"trainer.max_time={duration}: nothing would be trained; give a longer time"
    if settings.trainer.limit_test_batches == 0:
        yield "trainer.limit_test_batches=0: a run ends with its test; give 1 or more"
    if settings.trainer.barebones:
        yield "trainer.barebones=true: the run would have no checkpoint, log or result; set it to false"


@rule
def require_known_accelerator_and_strategy(settings: Settings) -> Iterator[str]:
    sections = [getattr(settings, key, None) for key in ("model", "data", "loss", "optimizer", "schedule")]
    targets = [section.target for section in sections if isinstance(section, OwnClass)]
    targets += [
        str(entry.get("_target_")) for group in (settings.logger, settings.callbacks) for entry in group.values()
    ]
    # Lightning lets other modules register more names when they are imported.
    is_open = not all(is_within(target, ("nin", "lightning", "torch")) for target in targets)
    accelerator, strategy = settings.trainer.accelerator, settings.trainer.strategy
    if not is_open and accelerator not in ACCELERATORS:
        yield f"trainer.accelerator={accelerator}: no such accelerator; {did_you_mean(accelerator, [*ACCELERATORS])}"
    name = strategy.lower()  # as Lightning reads it
    if not is_open and name not in STRATEGIES and not re.search(_COPIES, name):
        yield f"trainer.strategy={strategy}: no such strategy; {did_you_mean(name, [*STRATEGIES])}"


@rule
def require_separate_processes(settings: Settings) -> Iterator[str]:
    """The metrics and the state of a run are known to the processes that train, and to none that started them."""
    strategy = settings.trainer.strategy
    if re.search(_COPIES, strategy):
        yield f"trainer.strategy={strategy}: starts its processes as copies of one that does not train; choose ddp"


@rule
def require_devices_to_synchronize(settings: Settings) -> Iterator[str]:
    if not settings.trainer.sync_batchnorm:
        return
    if settings.trainer.accelerator == "cpu":
        yield "trainer.sync_batchnorm=true: torch synchronizes batch norm on GPUs only; set it to false"
    elif is_single_process(settings.trainer):
        yield "trainer.sync_batchnorm=true: there is one device, so nothing to synchronize; set it to false"


@rule
def require_monitored_metrics(settings: Settings) -> Iterator[str]:
    """A callback that monitors a metric needs one that is computed, and computed on held-out images."""
    unscored = settings.data.score_each_epoch == "test" or settings.trainer.limit_val_batches == 0
    # The user's own callback may log metrics of its own.
    closed = all(str(c.get("_target_")).startswith(("nin.", "lightning.")) for c in settings.callbacks.values())
    for name, callback in settings.callbacks.items():
        monitor = callback.get("monitor")
        if not isinstance(monitor, str):  # null: the callback's own default, or reported as of another type
            continue
        error = f"callbacks.{name}.monitor={monitor}: "
        if monitor.startswith("test/"):
            yield error + "test images must not decide when training ends; choose val/acc or val/loss"
        elif closed and monitor not in ("val/loss", "val/acc"):
            yield error + "no such metric; there are: val/loss, val/acc"
        elif unscored and monitor.startswith("val/"):
            yield error + (
                "this run does not compute it; set data.score_each_epoch=val and leave trainer.limit_val_batches "
                f"as it is, or remove the callback with ~callbacks.{name}"
            )


@rule
def require_momentum(settings: Settings) -> Iterator[str]:
    optimizer = settings.optimizer
    if isinstance(optimizer, SGD) and optimizer.nesterov and optimizer.momentum == 0:
        yield ("optimizer: nesterov=true needs momentum: set optimizer.momentum=0.9 or optimizer.nesterov=false")
