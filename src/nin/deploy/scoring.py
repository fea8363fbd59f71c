"""Test metrics of a trained network, whatever computes it. Imports no torch."""

from collections.abc import Callable
from typing import Any

import numpy as np

from nin.config.schema import TOP5_CLASSES, Data, FolderData, Settings, UserError
from nin.data.cache import MappedImages
from nin.data.sources import load
from nin.data.splits import open_folder, require_enough_images, split_folder
from nin.deploy.trained import BATCH_IMAGES, TrainedNetwork


def load_part(settings: Settings, part: str) -> tuple[np.ndarray | MappedImages, np.ndarray]:
    """The images and labels of one part of a data set that is prepared; of a folder, the images stay in their file.

    Args:
        part: "train" or "test".

    Returns:
        Images ``(count, height, width)`` or ``(count, height, width, 3)``, uint8, and labels ``(count,)``.

    Raises:
        UserError: if a file is damaged.
    """
    data = settings.data
    if isinstance(data, FolderData):
        cache = open_folder(data)
        if part == "train":
            require_enough_images(cache, data)
        rows = split_folder(cache, data, settings.seed)[part]
        pixels = np.memmap(cache.path / "images.bin", np.uint8, "r", shape=cache.shape)
        return MappedImages(pixels, rows), cache.labels()[rows]
    if not isinstance(data, Data):
        raise UserError(
            f"data: {data.target} makes its images itself, so no export can be checked or tested on them; nin predict "
            "and nin eval take the run or its checkpoint"
        )
    return load(data, part)


def evaluate_network(
    network: TrainedNetwork, images: np.ndarray | MappedImages, labels: np.ndarray, progress: Callable[[int, int], None]
) -> tuple[dict[str, Any], np.ndarray]:
    """The test metrics, with many classes also top-5 accuracy, and the confusion matrix: rows are true classes.

    Args:
        images: ``(count, height, width)`` or ``(count, height, width, 3)``, uint8.
        labels: ``(count,)``.
        progress: called with the number of images done, and of all.
    """
    names = network.description.class_names
    parts = []
    for start in range(0, len(images), BATCH_IMAGES):
        parts.append(network.predict(images[start : start + BATCH_IMAGES]))
        progress(start + len(parts[-1]), len(images))
    probabilities = np.concatenate(parts)
    predicted = probabilities.argmax(1)
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    of_true_class = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    right, all_ = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    metrics = {
        # A probability of 0 in float32 is one below 1e-45.
        "test/loss": round(float(-np.log(np.maximum(of_true_class, 1e-45)).mean()), 7),
        "test/acc": round(float((predicted == labels).mean()), 7),
        "test/acc_by_class": {n: r / c if c else None for n, r, c in zip(names, right, all_, strict=True)},
    }
    if len(names) > TOP5_CLASSES:
        more_probable = (probabilities > probabilities[np.arange(len(labels)), labels][:, None]).sum(1)
        metrics["test/top5_acc"] = round(float((more_probable < 5).mean()), 7)
    return metrics, confusion
