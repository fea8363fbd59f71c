"""Test metrics of a trained network, whatever computes it. Imports no torch."""

from collections.abc import Callable
from typing import Any

import numpy as np

from nin.deploy.trained import TrainedNetwork

BATCH_IMAGES = 128


def evaluate(
    network: TrainedNetwork, images: np.ndarray, labels: np.ndarray, progress: Callable[[int], None]
) -> tuple[dict[str, Any], np.ndarray]:
    """Loss, accuracy and accuracy by class, and the confusion matrix: rows are true classes, columns predicted.

    Args:
        images: ``(count, height, width)`` or ``(count, height, width, 3)``, uint8.
        labels: ``(count,)``.
        progress: called with the number of images of each batch.
    """
    names = network.description.class_names
    parts = []
    for start in range(0, len(images), BATCH_IMAGES):
        parts.append(network.predict(images[start : start + BATCH_IMAGES]))
        progress(len(parts[-1]))
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
    return metrics, confusion
