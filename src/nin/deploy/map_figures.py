"""Pictures of `nin predict --maps`: an image, and its top classes' score maps over it. Imports no torch."""

from pathlib import Path

import numpy as np

from nin.data.overlays import COLORS, blend, draw_image, escape, ignore_local_matplotlibrc, largest_magnitude
from nin.runs.files import open_atomically


def write_maps(
    path: Path,
    image: np.ndarray,
    class_names: list[str],
    probabilities: np.ndarray,
    logits: np.ndarray,
    maps: np.ndarray,
    top: int,
) -> None:
    """Writes a PNG file: the image, then the ``top`` most probable classes' maps over it in one color scale.

    Below each map are its mean and the logit: with global average pooling they are equal; what a fully connected
    layer's bias (or, for Grad-CAM, the layers that follow) adds is named.

    Args:
        image: ``(height, width)`` or ``(height, width, 3)``, uint8.
        probabilities, logits: ``(classes,)``.
        maps: ``(classes, height, width)``.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    ignore_local_matplotlibrc()
    best = np.argsort(-probabilities, kind="stable")[:top]
    columns = 1 + len(best)
    width, height = 2.3 * columns + 0.9, 2.9  # inches
    figure = Figure(figsize=(width, height))
    # Placed by hand: a layout engine would take longer than the network.
    panels = [figure.add_axes(((0.1 + 2.3 * i) / width, 0.05, 2.1 / width, 2.1 / height)) for i in range(columns)]
    draw_image(panels[0], image)
    panels[0].set_title("image", fontsize=9)
    limit = largest_magnitude(maps[best])
    for axes, i in zip(panels[1:], best, strict=True):
        draw_image(axes, blend(image, maps[i], limit))
        title = f"{class_names[i]}\n{probabilities[i]:.4f}\n{_sum(maps[i].mean(), logits[i])}"
        axes.set_title(escape(title), fontsize=9)
    scale = ScalarMappable(Normalize(-limit, limit), COLORS)
    figure.colorbar(scale, cax=figure.add_axes((1 - 0.75 / width, 0.1, 0.12 / width, 2.0 / height)))
    with open_atomically(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _sum(mean: float, logit: float) -> str:
    rest = logit - mean
    if abs(rest) <= 1e-4 * max(1.0, abs(logit)):
        return f"mean {mean:.3f} = logit"
    return f"mean {mean:.3f} {'+' if rest >= 0 else '−'} {abs(rest):.3f} = logit {logit:.3f}"
