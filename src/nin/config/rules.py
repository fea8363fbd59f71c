"""Rules on several config keys at once. Imports no torch.

A rule is a function that yields a message for each error that it finds. `reads` registers it with the keys that it
reads. `find_errors` skips a rule if one of these keys has an invalid value: then that value is the error to report.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from nin.config.networks import smallest_image_size
from nin.config.schema import TEST_IMAGES, TRAINING_IMAGES, Settings, is_single_process, is_within


@dataclass(frozen=True)
class Rule:
    """A function on settings, and the keys that it reads."""

    keys: tuple[str, ...]
    find_errors: Callable[[Settings], Iterator[str]]


RULES: list[Rule] = []


def reads(*keys: str) -> Callable[[Callable[[Settings], Iterator[str]]], Callable[[Settings], Iterator[str]]]:
    """Registers a rule that reads ``keys``: keys, or sections with all their keys."""

    def register(rule: Callable[[Settings], Iterator[str]]) -> Callable[[Settings], Iterator[str]]:
        RULES.append(Rule(keys, rule))
        return rule

    return register


def find_errors(settings: Settings, invalid: Iterable[str] = ()) -> list[str]:
    """The errors of all rules that read none of the keys in ``invalid``."""
    invalid = list(invalid)
    return [
        error
        for rule in RULES
        if not any(is_within(key, rule.keys) or any(is_within(k, [key]) for k in rule.keys) for key in invalid)
        for error in rule.find_errors(settings)
    ]


@reads("data.image_size", "model")
def require_large_enough_images(settings: Settings) -> Iterator[str]:
    size, smallest = settings.data.image_size, smallest_image_size(settings.model)
    if smallest > 1024:
        yield f"model: needs images of at least {smallest} pixels a side, and 1024 is the maximum; use smaller strides"
    elif size < smallest:
        small = ", or model=nin_small, which is made for 28" if size >= 28 else ""
        yield (
            f"data.image_size={size}: {settings.model.name} needs at least {smallest} pixels a side; "
            f"choose data.image_size={smallest} or more{small}"
        )


@reads("data.name", "data.val_size")
def require_training_images(settings: Settings) -> Iterator[str]:
    held_out, images = settings.data.val_size, TRAINING_IMAGES[settings.data.name]
    if held_out >= images:
        yield f"data.val_size={held_out}: {settings.data.name} has {images} training images; hold out fewer"


@reads("data.name", "data.val_size", "data.batch_size")
def require_one_full_batch(settings: Settings) -> Iterator[str]:
    images = TRAINING_IMAGES[settings.data.name] - settings.data.val_size
    if 0 < images < settings.data.batch_size:
        yield (
            f"data.batch_size={settings.data.batch_size}: there are {images} training images"
            f"{f' after {settings.data.val_size} are held out' if settings.data.val_size else ''}; choose at most that"
        )


@reads("data.val_size", "data.score_each_epoch")
def require_images_for_selection(settings: Settings) -> Iterator[str]:
    if not settings.data.val_size and settings.data.score_each_epoch == "val":
        yield (
            "data.val_size=0: there are no held-out images for choosing the best checkpoint; choose data.val_size=5000 "
            "or data.score_each_epoch=test as in the notebooks (the last epoch's weights are then the best)"
        )


@reads("trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "schedule")
def require_an_end_of_training(settings: Settings) -> Iterator[str]:
    trainer, schedule = settings.trainer, settings.schedule
    if trainer.max_epochs not in (-1, None) or trainer.max_steps != -1:
        return
    if schedule.name != "constant" or schedule.warmup:
        yield f"schedule={schedule.name}: depends on the number of steps; set trainer.max_epochs or trainer.max_steps"
    elif trainer.max_time is None:
        given = "null" if trainer.max_epochs is None else trainer.max_epochs
        yield f"trainer.max_epochs={given}: training would never end; set it, or trainer.max_steps"


@reads("trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches", "trainer.limit_test_batches")
def require_work(settings: Settings) -> Iterator[str]:
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(settings.trainer, key) == 0:
            yield f"trainer.{key}=0: nothing would be trained; give 1 or more"
    if settings.trainer.limit_test_batches == 0:
        yield "trainer.limit_test_batches=0: a run ends with its test; give 1 or more"


@reads("trainer.barebones")
def require_results(settings: Settings) -> Iterator[str]:
    if settings.trainer.barebones:
        yield "trainer.barebones=true: the run would have no checkpoint, log or result; set it to false"


LIMITS = tuple(f"trainer.{key}" for key in ("limit_train_batches", "limit_val_batches", "limit_test_batches"))
BATCHES = (
    *LIMITS, "trainer.overfit_batches", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "data.name", "data.val_size", "data.batch_size", "data.score_each_epoch",
)  # fmt: skip


@reads(*BATCHES)
def require_batches_within_limits(settings: Settings) -> Iterator[str]:
    """Lightning rounds a share of the batches down, and refuses 0 batches when training has begun."""
    if not is_single_process(settings.trainer):  # the number of batches depends on the machine's devices
        return
    batches = _count_batches(settings)
    limits = {key: (getattr(settings.trainer, key.removeprefix("trainer.")), batches[key]) for key in LIMITS}
    limits["trainer.overfit_batches"] = (settings.trainer.overfit_batches, batches["trainer.limit_train_batches"])
    for key, (limit, available) in limits.items():
        if isinstance(limit, float) and limit > 0 and available > 0 and int(available * limit) == 0:
            smallest = math.ceil(1e4 / available) / 1e4
            yield (
                f"{key}={limit:g}: leaves none of {available} batches; choose {smallest:g} or more, or a number of "
                "batches, as in 1"
            )


@reads(*BATCHES, "trainer.val_check_interval", "trainer.check_val_every_n_epoch")
def require_scoring_within_epochs(settings: Settings) -> Iterator[str]:
    interval = settings.trainer.val_check_interval
    if interval is None or not isinstance(interval, int | float):
        return
    if interval == 0:
        yield (
            "trainer.val_check_interval=0: must be a number of batches (1, 2, …), a share of an epoch (above 0.0, up "
            "to 1.0) or null, which is once an epoch; trainer.limit_val_batches=0 turns validation off"
        )
    elif isinstance(interval, int) and settings.trainer.check_val_every_n_epoch and is_single_process(settings.trainer):
        batches, limit = _count_batches(settings)["trainer.limit_train_batches"], settings.trainer.limit_train_batches
        if limit is not None:
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        if interval > batches > 0:
            yield (
                f"trainer.val_check_interval={interval}: an epoch has {batches} batches; choose at most that, or set "
                "trainer.check_val_every_n_epoch=null to count the batches of all epochs"
            )


def _count_batches(settings: Settings) -> dict[str, int]:
    """The number of batches to which each limit applies, in a run of one process."""
    data = settings.data
    training, test = TRAINING_IMAGES[data.name] - data.val_size, TEST_IMAGES[data.name]
    images = (training, test if data.score_each_epoch == "test" else data.val_size, test)
    return {key: math.ceil(max(0, n) / data.batch_size) for key, n in zip(LIMITS, images, strict=True)}


@reads("trainer.sync_batchnorm", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy")
def require_devices_to_synchronize(settings: Settings) -> Iterator[str]:
    if not settings.trainer.sync_batchnorm:
        return
    if settings.trainer.accelerator == "cpu":
        yield "trainer.sync_batchnorm=true: torch synchronizes batch norm on GPUs only; set it to false"
    elif is_single_process(settings.trainer):
        yield "trainer.sync_batchnorm=true: there is one device, so nothing to synchronize; set it to false"


@reads("callbacks", "data.score_each_epoch", "trainer.limit_val_batches")
def require_monitored_metrics(settings: Settings) -> Iterator[str]:
    """A callback that monitors a metric needs one that is computed, and computed on held-out images."""
    unscored = settings.data.score_each_epoch == "test" or settings.trainer.limit_val_batches == 0
    # The user's own callback may log metrics of its own.
    closed = all(str(c.get("_target_")).startswith(("nin.", "lightning.")) for c in settings.callbacks.values())
    for name, callback in settings.callbacks.items():
        if "monitor" not in callback:
            continue
        monitor = str(callback["monitor"])
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
