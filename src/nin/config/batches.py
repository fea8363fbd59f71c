"""Rules on numbers of images and batches. Imports no torch.

The number of images is known before any is read for the published data sets only; that of a folder is checked when it
is read.
"""

import math
from collections.abc import Iterator

from nin.config.data_sets import TEST_IMAGES, TRAINING_IMAGES, Data
from nin.config.schema import Settings, is_single_process

LIMITS = tuple(f"trainer.{key}" for key in ("limit_train_batches", "limit_val_batches", "limit_test_batches"))
KEYS = (
    *LIMITS, "trainer.overfit_batches", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "data.name", "data.val_size", "data.batch_size", "data.score_each_epoch",
)  # fmt: skip


def require_training_images(settings: Settings) -> Iterator[str]:
    if (data := _published(settings)) is None:
        return
    held_out, images = data.val_size, TRAINING_IMAGES[data.name]
    if held_out >= images:
        yield f"data.val_size={held_out}: {settings.data.name} has {images} training images; hold out fewer"


def require_one_full_batch(settings: Settings) -> Iterator[str]:
    if (data := _published(settings)) is None:
        return
    images = TRAINING_IMAGES[data.name] - data.val_size
    if 0 < images < settings.data.batch_size:
        yield (
            f"data.batch_size={settings.data.batch_size}: there are {images} training images"
            f"{f' after {data.val_size} are held out' if data.val_size else ''}; choose at most that"
        )


def require_images_for_selection(settings: Settings) -> Iterator[str]:
    data = _published(settings)
    if data and not data.val_size and data.score_each_epoch == "val":
        yield (
            "data.val_size=0: there are no held-out images for choosing the best checkpoint; choose data.val_size=5000 "
            "or data.score_each_epoch=test as in the notebooks (the last epoch's weights are then the best)"
        )


def require_valid_limits(settings: Settings) -> Iterator[str]:
    """Lightning's convention: an int is a number of batches, a float is a share of all batches."""
    for key in (*LIMITS, "trainer.limit_predict_batches", "trainer.overfit_batches", "trainer.val_check_interval"):
        value = getattr(settings.trainer, key.removeprefix("trainer."))
        if isinstance(value, int | float) and (value < 0 or (isinstance(value, float) and value > 1)):
            yield (f"{key}={value:g}: must be a number of batches (0, 1, 2, …) or a share of all batches (0.0 to 1.0)")


def require_batches_within_limits(settings: Settings) -> Iterator[str]:
    """Lightning rounds a share of the batches down, and refuses 0 batches when training has begun."""
    # The number of batches depends on the machine's devices.
    if not (is_single_process(settings.trainer) and _published(settings)):
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


def require_scoring_within_epochs(settings: Settings) -> Iterator[str]:
    interval = settings.trainer.val_check_interval
    if interval is None or not isinstance(interval, int | float):
        return
    if interval == 0:
        yield (
            "trainer.val_check_interval=0: must be a number of batches (1, 2, …), a share of an epoch (above 0.0, up "
            "to 1.0) or null, which is once an epoch; trainer.limit_val_batches=0 turns validation off"
        )
    elif (
        isinstance(interval, int)
        and settings.trainer.check_val_every_n_epoch
        and is_single_process(settings.trainer)
        and _published(settings)
    ):
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
    data = _published(settings)
    assert data  # its callers check that
    training, test = TRAINING_IMAGES[data.name] - data.val_size, TEST_IMAGES[data.name]
    images = (training, test if data.score_each_epoch == "test" else data.val_size, test)
    return {key: math.ceil(max(0, n) / data.batch_size) for key, n in zip(LIMITS, images, strict=True)}


def _published(settings: Settings) -> Data | None:
    """The data set if its number of images is known before any is read. That of a folder is checked when it is read."""
    return settings.data if isinstance(settings.data, Data) else None
