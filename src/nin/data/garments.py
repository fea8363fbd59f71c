"""Synthetic clothing silhouettes in Fashion-MNIST's ten classes, generated from fixed seeds: nothing to download."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from nin.config.data_sets import DATA_SETS

_SCALE = 4  # generated at 112x112 and reduced to 28x28, for antialiased edges

Point = tuple[float, float]


def write_files(folder: Path) -> None:
    """Writes the four IDX files under Fashion-MNIST's file names. The images are the same on every machine."""
    known = DATA_SETS["garments"]
    for part, count, seed in (("train", known.training_images, 1), ("t10k", known.test_images, 2)):
        random = np.random.default_rng(seed)
        labels = random.permutation(np.arange(count) % 10).astype(np.uint8)
        images = np.stack([garment(int(label), random) for label in labels])
        for values, kind in ((images, "images-idx3-ubyte"), (labels, "labels-idx1-ubyte")):
            # IDX: two zero bytes, 8 for unsigned bytes, the number of dimensions, the sizes, then the values.
            header = np.array([0x0800 + values.ndim, *values.shape], dtype=">u4")
            (folder / f"{part}-{kind}").write_bytes(header.tobytes() + values.tobytes())


def garment(label: int, random: np.random.Generator) -> np.ndarray:
    """Returns one image, ``(28, 28)`` uint8: the outline of class ``label`` with random shape, rotation, brightness,
    and noise."""
    size = 28 * _SCALE
    canvas = Image.new("L", (size, size))
    drawing = ImageDraw.Draw(canvas)
    shade = int(random.integers(80, 256))
    angle, scale = random.normal(0, 0.12), random.uniform(0.75, 1.08)
    shift = random.normal(0, 0.04, 2)
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    def fill(points: list[Point], tone: float) -> None:
        jittered = np.array(points) + random.normal(0, 0.02, (len(points), 2))
        placed = ((jittered - 0.5) @ rotation.T + 0.5 + shift) * size
        drawing.polygon([tuple(p) for p in placed], fill=int(np.clip(shade * tone, 0, 255)))

    _OUTLINES[label](fill, random)
    canvas = canvas.filter(ImageFilter.GaussianBlur(_SCALE / 3)).resize((28, 28), Image.Resampling.BOX)
    image = np.asarray(canvas, dtype=np.float64)
    image = image + (image > 8) * random.normal(0, 25, image.shape)
    return image.clip(0, 255).astype(np.uint8)


Fill = Callable[[list[Point], float], None]


def _mirrored(left: list[Point]) -> list[Point]:
    """Returns a symmetric outline from its left half, which runs from the top center to the bottom center."""
    return left + [(1 - x, y) for x, y in reversed(left)]


def _top(sleeve: float, neck: float, hem: float, waist: float) -> list[Point]:
    """Returns the outline of a garment with sleeves.

    Args:
        sleeve: length of the sleeves, 0 for none, 1 for long ones.
        neck: depth of the neckline, as a fraction of the image's height.
        hem: vertical position of the hem.
        waist: horizontal position of the waist.
    """
    hand = (0.27 - 0.17 * sleeve, 0.30 + 0.45 * sleeve)
    cuff = (hand[0] + 0.11, hand[1] + 0.03)
    return _mirrored([(0.42, 0.14 + neck), (0.38, 0.14), (0.25, 0.2), hand, cuff, (0.32, 0.38), (waist, hem)])


def _t_shirt(fill: Fill, random: np.random.Generator) -> None:
    fill(_top(random.uniform(0.05, 0.45), 0.05, 0.84, 0.31), 1)


def _trouser(fill: Fill, random: np.random.Generator) -> None:
    gap = random.uniform(0.02, 0.06)
    fill(_mirrored([(0.36, 0.08), (0.33, 0.5), (0.32, 0.93), (0.47 - gap, 0.93), (0.5 - gap / 2, 0.35)]), 1)


def _pullover(fill: Fill, random: np.random.Generator) -> None:
    fill(_top(random.uniform(0.85, 1.05), 0.02, 0.82, 0.31), 1)
    fill([(0.31, 0.76), (0.69, 0.76), (0.69, 0.82), (0.31, 0.82)], random.uniform(0.6, 1))  # the hem


def _dress(fill: Fill, random: np.random.Generator) -> None:
    flare = random.uniform(0.18, 0.28)
    fill(_mirrored([(0.44, 0.12), (0.4, 0.07), (0.37, 0.2), (0.43, 0.42), (flare + 0.06, 0.95)]), 1)


def _coat(fill: Fill, random: np.random.Generator) -> None:
    fill(_top(random.uniform(0.9, 1.1), 0.08, 0.94, 0.29), 1)
    fill([(0.485, 0.2), (0.515, 0.2), (0.515, 0.94), (0.485, 0.94)], random.uniform(0.2, 1))  # the opening


def _sandal(fill: Fill, random: np.random.Generator) -> None:
    heel = random.uniform(0.0, 0.14)
    fill([(0.08, 0.68), (0.5, 0.68 - heel / 3), (0.92, 0.6 - heel), (0.92, 0.72), (0.5, 0.74), (0.08, 0.75)], 1)
    for x in (0.2, 0.45, 0.72):
        lean = random.uniform(-0.06, 0.06)
        fill([(x, 0.69), (x + lean, 0.44), (x + lean + 0.06, 0.44), (x + 0.06, 0.69)], 0.8)


def _shirt(fill: Fill, random: np.random.Generator) -> None:
    fill(_top(random.uniform(0.4, 0.9), 0.09, 0.86, 0.32), 1)
    buttons = random.uniform(0.2, 1)
    for y in np.arange(0.3, 0.82, 0.12):
        fill([(0.48, y), (0.52, y), (0.52, y + 0.045), (0.48, y + 0.045)], buttons)


def _sneaker(fill: Fill, random: np.random.Generator) -> None:
    top = random.uniform(0.42, 0.48)
    fill([(0.06, 0.62), (0.3, 0.56), (0.52, top), (0.92, top - 0.02), (0.94, 0.7), (0.06, 0.7)], 1)
    fill([(0.05, 0.7), (0.95, 0.7), (0.95, 0.77), (0.05, 0.77)], 0.6)  # the sole


def _bag(fill: Fill, random: np.random.Generator) -> None:
    rise = random.uniform(0.08, 0.2)
    fill([(0.3, 0.42), (0.36, 0.42 - rise), (0.64, 0.42 - rise), (0.7, 0.42)], 0.9)
    fill([(0.35, 0.42), (0.39, 0.46 - rise), (0.61, 0.46 - rise), (0.65, 0.42)], 0)  # the opening of the handle
    fill([(0.16, 0.4), (0.84, 0.4), (0.88, 0.84), (0.12, 0.84)], 1)


def _ankle_boot(fill: Fill, random: np.random.Generator) -> None:
    shaft = random.uniform(0.12, 0.24)
    fill([(0.06, 0.72), (0.34, 0.58), (0.5, 0.5), (0.52, shaft), (0.88, shaft), (0.9, 0.76), (0.06, 0.76)], 1)
    fill([(0.06, 0.76), (0.6, 0.76), (0.62, 0.8), (0.7, 0.8), (0.7, 0.86), (0.9, 0.86), (0.9, 0.76)], 0.7)


_OUTLINES = (_t_shirt, _trouser, _pullover, _dress, _coat, _sandal, _shirt, _sneaker, _bag, _ankle_boot)
