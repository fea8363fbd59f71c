"""Figures of a run: its curves, the confusion matrix, wrongly classified images."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from nin.config.errors import shorten
from nin.data.overlays import blend, draw_image, escape, ignore_local_matplotlibrc, largest_magnitude

ignore_local_matplotlibrc()

# The name of each chart of training curves, and that of its metrics after ``train/`` or ``val/``.
CURVES = {"loss": "loss", "accuracy": "acc"}

# An image ``(channels, height, width)`` from 0 to 1, its label, the predicted class, and where there are score maps
# those of both classes, ``(2, height, width)``.
Mistake = tuple[np.ndarray, int, int, np.ndarray | None]

# The confusion matrix of more classes shows the most confused ones only.
_MATRIX_CLASSES = 30


def draw_curves(rows: list[dict[str, Any]]) -> Figure:
    """Loss and accuracy over the steps: training dashed, with one point per epoch, validation or test as full lines.

    Args:
        rows: of ``metrics.csv``, one per epoch; the training metrics are means over the epoch.
    """
    # Fixed margins: a layout that measures the text takes half as long again, in every trial of a search.
    figure = Figure(figsize=(9, 3.6))
    figure.subplots_adjust(left=0.1, right=0.985, bottom=0.135, top=0.97, wspace=0.24)
    for axes, (name, tag) in zip(figure.subplots(1, 2), CURVES.items(), strict=True):
        for split, style in (("train", "--"), ("val", "-"), ("test", "-")):
            points = [(row["step"], row[f"{split}/{tag}"]) for row in rows if f"{split}/{tag}" in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, marker=".", label=f"{split}/{tag}")
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_confusion(counts: Tensor, class_names: tuple[str, ...]) -> Figure:
    """The confusion matrix; of many classes, the part of those that are confused most.

    Args:
        counts: ``(classes, classes)``: rows are true classes, columns predicted.
    """
    shown = list(range(len(class_names)))
    title = "test images"
    if len(class_names) > _MATRIX_CLASSES:
        shown = most_confused(counts, _MATRIX_CLASSES)
        title = f"test images: the {_MATRIX_CLASSES} most confused of {len(class_names)} classes"
    side = max(7.5, 0.45 * len(shown))
    figure = Figure(figsize=(side + 0.5, side), layout="constrained")
    axes = figure.subplots()
    part = counts[shown][:, shown].numpy()
    axes.imshow(part, cmap="Blues")
    names = [escape(shorten(class_names[i], 40)) for i in shown]
    axes.set_xticks(range(len(shown)), names, rotation=90)
    axes.set_yticks(range(len(shown)), names)
    for (row, column), count in np.ndenumerate(part):
        if count:
            color = "white" if count > part.max() / 2 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    return figure


def most_confused(counts: Tensor, limit: int) -> list[int]:
    """The labels, ascending, of the ``limit`` classes with the most errors, as true and as predicted class.

    Args:
        counts: confusion matrix ``(classes, classes)``; rows are true classes.
    """
    errors = counts - counts.diag().diag()
    order = (errors.sum(0) + errors.sum(1)).argsort(descending=True, stable=True)
    return sorted(order[:limit].tolist())


def draw_wrong(wrong: list[Mistake], class_names: tuple[str, ...]) -> Figure:
    """Each image; where there are score maps, beside it those of the true and the predicted class over it.

    Args:
        wrong: images of one size.
    """
    with_maps = wrong[0][3] is not None
    columns, width, height = (3, 4.4, 1.9) if with_maps else (6, 1.6, 1.9)  # in inches, with the space between images
    rows = math.ceil(len(wrong) / columns)
    figure = Figure(figsize=(columns * width, rows * height))
    # One for all: axes for each image and a layout that measures their titles take several times as long.
    axes = figure.add_axes((0, 0, 1, 1))
    places = (" (middle)", " (right)") if with_maps else ("", "")
    for i, (values, label, predicted, maps) in enumerate(wrong):
        image = _with_maps(values, maps)
        pixels = max(image.shape[0] / (height - 0.5), image.shape[1] / (width - 0.2))  # per inch
        row, column = divmod(i, columns)
        middle, bottom = (column + 0.5) * width * pixels, (row + 1) * height * pixels
        draw_image(axes, image, middle - image.shape[1] / 2, bottom - image.shape[0])
        title = f"{class_names[label]}{places[0]}\npredicted: {class_names[predicted]}{places[1]}"
        above = bottom - image.shape[0] - 0.05 * pixels
        axes.text(middle, above, escape(title), ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(0, columns * width * pixels), ylim=((rows * height + 0.05) * pixels, 0), aspect="auto")
    return figure


def _with_maps(values: np.ndarray, maps: np.ndarray | None) -> np.ndarray:
    """The image of a mistake as ``draw_image`` takes it, with its score maps beside it."""
    image = (values.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)
    image = image.squeeze(-1 if len(values) == 1 else ())
    if maps is None:
        return image
    limit = largest_magnitude(maps)
    return np.concatenate([blend(image, part, limit) for part in (np.zeros_like(maps[0]), *maps)], axis=1)
