"""Divides the images of a folder into those for training, validation and test."""

import logging
from collections.abc import Sequence

import numpy as np

from nin.config.data_sets import Data, FolderData, OwnData
from nin.config.errors import printable
from nin.config.schema import Settings, UserError
from nin.data.cache import Cache, open_cache
from nin.data.folder import PARTS, missing_train_error

log = logging.getLogger(__name__)

# The names of the parts in messages.
_NAMES = {"train": "training", "val": "validation", "test": "test"}
# What other data sets call the folders of these parts, in lower case.
_SIMILAR = {"val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test", "testing": "test"}
_opened: dict[FolderData, Cache] = {}


def open_folder(data: FolderData, again: bool = False) -> Cache:
    """The decoded images of a folder, which is listed when this process first needs them.

    Args:
        again: list it again: it may have changed since another run of this process.

    Raises:
        UserError: names every fault of the folder, or ``data.test_size`` if it doesn't fit its number of images.
    """
    if again or data not in _opened:
        cache = open_cache(data)
        require_enough_images(cache, data, ("test",))  # a network may be tested on images that are too few to train it
        _opened[data] = cache
    return _opened[data]


def with_channels(settings: Settings, channels: int) -> Settings:
    """``settings`` whose folder has images of ``channels``, those of a trained network.

    Another folder than that of the training may have only gray images. Other data sets stay as they are.
    """
    data = settings.data
    if not isinstance(data, FolderData) or open_folder(data).channels == channels:
        return settings
    data = data.model_copy(update={"channels": channels})
    open_folder(data, again=True)
    return settings.model_copy(update={"data": data})


def require_enough_images(cache: Cache, data: FolderData, parts: Sequence[str] = ("val", "test")) -> None:
    """Raises UserError if ``parts`` or the training have too few images.

    The rules of the config check the published data sets.
    """
    counts = cache.counts
    if "train" not in counts:
        if "val" in parts:
            raise missing_train_error(data.root)
        return
    held_out = {part: count for part, count in count_held_out(cache, data).items() if part in parts}
    left = counts["train"] - sum(held_out.values())
    errors = []
    for part, count in held_out.items():
        if count == 0 and (part, data.score_each_epoch) != ("val", "test"):
            size = getattr(data, f"{part}_size")
            errors.append(
                f"data.{part}_size={size}: leaves no {_NAMES[part]} images, and data.root has no {part}/; hold "
                f"out more of the {counts['train']} training images, or add {part}/"
            )
    if left <= 0:
        errors.append(
            f"data.root: there are {counts['train']} training images, and none is left after {sum(held_out.values())} "
            "are held out; hold out fewer"
        )
    if errors:
        raise UserError(*errors)


def count_held_out(cache: Cache, data: FolderData) -> dict[str, int]:
    """Returns how many training images are held out for each part that the folder lacks; nothing if it has none."""
    train = cache.counts.get("train", 0)
    sizes = {"val": data.val_size, "test": data.test_size} if train else {}
    return {
        part: size if isinstance(size, int) else round(size * train)
        for part, size in sizes.items()
        if part not in cache.counts
    }


def warn_of_other_images(data: Data | FolderData | OwnData, trained_on: object) -> None:
    """Warns before a test whose images are split off a folder that has changed: they may have been in the training.

    Args:
        trained_on: the fingerprint of the images that the run had; None if it is not known.
    """
    if not isinstance(data, FolderData):
        return
    cache = open_folder(data)
    if trained_on not in (None, cache.fingerprint) and "test" not in cache.counts:
        log.warning(
            "data.root=%s: has no test/, and other images than those that the run had: the test images are split off "
            "its training images again, and the network may have been trained on some of them",
            printable(data.root),
        )


def describe_split(cache: Cache, data: FolderData, seed: int) -> dict[str, str]:
    """Returns the entries of a result that describe the parts which the folder lacks."""
    return {
        f"{part}_split": f"{count} of {cache.counts['train']} training images, chosen by seed {seed}"
        for part, count in count_held_out(cache, data).items()
    }


def describe_folder(data: FolderData, seed: int) -> str:
    """The classes, and the number of images in each part, in one line: a wrong layout of the folder is seen in it."""
    cache = open_folder(data)
    names, held_out = [printable(name) for name in cache.class_names], count_held_out(cache, data)
    more = [f"and {len(names) - 5} more"] if len(names) > 6 else []
    parts = []
    for part, rows in split_folder(cache, data, seed).items():
        source = "held out of train/" if part in held_out else f"{part}/"
        parts.append(f"{len(rows):,} {_NAMES[part]} images ({source})")
    listed = names[:5] if more else names
    return f"{len(names)} classes ({', '.join([*listed, *more])}); {', '.join(parts)}"


def split_folder(cache: Cache, data: FolderData, seed: int) -> dict[str, np.ndarray]:
    """The rows of "train", "val" and "test": int64 ``(count,)``, ascending.

    What the folder lacks is held out of the training images, with the classes in proportion. The test images depend on
    nothing but ``seed`` and ``data.test_size``.
    """
    rows = {part: np.array(cache.rows(part), dtype=np.int64) for part in PARTS}
    held_out = count_held_out(cache, data)
    labels = cache.labels()[rows["train"]]
    # The same test images for every number of validation images, so they are taken first.
    order = order_in_proportion(labels, seed)
    start = 0
    for part in ("test", "val"):
        if part in held_out:
            rows[part] = np.sort(rows["train"][order[start : start + held_out[part]]])
            start += held_out[part]
    rows["train"] = np.sort(rows["train"][order[start:]])
    return rows


def require_training_images(data: Data | FolderData | OwnData, seed: int) -> None:
    """Raises UserError if a folder has too few images to train on, or a part of it has another name, as ``valid/``."""
    if not isinstance(data, FolderData):
        return
    cache = open_folder(data)
    require_enough_images(cache, data)
    labels = cache.labels()[split_folder(cache, data, seed)["train"]]
    counts = count_held_out(cache, data)
    held_out = sum(counts.values())
    errors = []
    if absent := [name for label, name in enumerate(cache.class_names) if label not in labels]:
        errors.append(
            f"data.root: all training images of {', '.join(map(printable, absent))} are held out; add images, or hold "
            "out fewer with data.val_size or data.test_size"
        )
    for name in cache.other_files:
        part = _SIMILAR.get(name.removesuffix("/").lower(), "") if name.endswith("/") else ""
        if counts.get(part):  # training images in their place
            errors.append(f"data.root: {printable(name)} is not read; the images must be in {part}/: rename or move it")
    if len(labels) < data.batch_size:
        after = f" after {held_out} are held out" if held_out else ""
        errors.append(
            f"data.batch_size={data.batch_size}: there are {len(labels)} training images{after}; choose at most that"
        )
    if errors:
        raise UserError(*errors)


def order_in_proportion(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order in which every stretch has the classes in about the proportion of all ``labels``."""
    order = np.random.default_rng(seed).permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        places = np.flatnonzero(labels[order] == label)
        position[places] = (np.arange(len(places)) + 0.5) / len(places)
    return order[np.argsort(position, kind="stable")]
