"""The rules on several keys at once. Imports no torch.

A rule is a function that yields a message for each error that it finds. Whether the arguments of a network fit each
other, and whether images are large enough for it, is found by building it (``networks/build.py``).
"""

from collections.abc import Callable, Iterable, Iterator

from nin.config import batches
from nin.config.schema import SGD, Settings, is_single_process, is_within


def find_errors(settings: Settings, invalid: Iterable[str] = ()) -> list[str]:
    """The errors of all rules that read none of the keys in ``invalid``: that value is the error to report."""
    invalid = list(invalid)
    return [
        error
        for keys, rule in RULES
        if not any(is_within(key, keys) or any(is_within(k, [key]) for k in keys) for key in invalid)
        for error in rule(settings)
    ]


def require_an_end_of_training(settings: Settings) -> Iterator[str]:
    trainer, schedule = settings.trainer, settings.schedule
    if trainer.max_epochs not in (-1, None) or trainer.max_steps != -1:
        return
    if schedule.name != "constant" or schedule.warmup:
        yield f"schedule={schedule.name}: depends on the number of steps; set trainer.max_epochs or trainer.max_steps"
    elif trainer.max_time is None:
        given = "null" if trainer.max_epochs is None else trainer.max_epochs
        yield f"trainer.max_epochs={given}: training would never end; set it, or trainer.max_steps"


def require_minimum_below_maximum(settings: Settings) -> Iterator[str]:
    trainer = settings.trainer
    for unit in ("epochs", "steps"):
        least, most = getattr(trainer, f"min_{unit}"), getattr(trainer, f"max_{unit}")
        if least and most not in (-1, None) and least > most:
            yield f"trainer.min_{unit}={least}: must be at most trainer.max_{unit}, which is {most}"


def require_work(settings: Settings) -> Iterator[str]:
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(settings.trainer, key) == 0:
            yield f"trainer.{key}=0: nothing would be trained; give 1 or more"
    if settings.trainer.limit_test_batches == 0:
        yield "trainer.limit_test_batches=0: a run ends with its test; give 1 or more"


def require_results(settings: Settings) -> Iterator[str]:
    if settings.trainer.barebones:
        yield "trainer.barebones=true: the run would have no checkpoint, log or result; set it to false"


def require_devices_to_synchronize(settings: Settings) -> Iterator[str]:
    if not settings.trainer.sync_batchnorm:
        return
    if settings.trainer.accelerator == "cpu":
        yield "trainer.sync_batchnorm=true: torch synchronizes batch norm on GPUs only; set it to false"
    elif is_single_process(settings.trainer):
        yield "trainer.sync_batchnorm=true: there is one device, so nothing to synchronize; set it to false"


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


def require_momentum(settings: Settings) -> Iterator[str]:
    optimizer = settings.optimizer
    if isinstance(optimizer, SGD) and optimizer.nesterov and optimizer.momentum == 0:
        yield ("optimizer: nesterov=true needs momentum: set optimizer.momentum=0.9 or optimizer.nesterov=false")


# Each rule with the keys that it reads: keys, or sections with all their keys.
RULES: tuple[tuple[tuple[str, ...], Callable[[Settings], Iterator[str]]], ...] = (
    (("data.name", "data.val_size"), batches.require_training_images),
    (("data.name", "data.val_size", "data.batch_size"), batches.require_one_full_batch),
    (("data.name", "data.val_size", "data.score_each_epoch"), batches.require_images_for_selection),
    (("trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "schedule"), require_an_end_of_training),
    (
        ("trainer.min_epochs", "trainer.max_epochs", "trainer.min_steps", "trainer.max_steps"),
        require_minimum_below_maximum,
    ),
    (
        ("trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches", "trainer.limit_test_batches"),
        require_work,
    ),
    (("trainer.barebones",), require_results),
    (
        (*batches.LIMITS, "trainer.limit_predict_batches", "trainer.overfit_batches", "trainer.val_check_interval"),
        batches.require_valid_limits,
    ),
    (batches.KEYS, batches.require_batches_within_limits),
    (
        (*batches.KEYS, "trainer.val_check_interval", "trainer.check_val_every_n_epoch"),
        batches.require_scoring_within_epochs,
    ),
    (
        ("trainer.sync_batchnorm", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
        require_devices_to_synchronize,
    ),
    (("callbacks", "data.score_each_epoch", "trainer.limit_val_batches"), require_monitored_metrics),
    (("optimizer",), require_momentum),
)
