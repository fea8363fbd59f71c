"""Images and score maps over them, for matplotlib. Imports no torch."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PIXELS = 224  # the longer side of pictures with a score map, so that a map of 3x3 values becomes a smooth overlay
COLORS = "RdBu_r"  # red raises a class's logit, blue lowers it


def draw_image(axes: Any, image: np.ndarray, left: float = 0, top: float = 0) -> None:
    """Draws an image ``(height, width)`` or ``(height, width, 3)``, uint8, without ticks.

    Args:
        left, top: its place where axes show several images, in pixels.
    """
    gray = {"cmap": "gray", "vmin": 0, "vmax": 255} if image.ndim == 2 else {}
    height, width = image.shape[:2]
    axes.imshow(image, extent=(left, left + width, top + height, top), **gray)
    axes.axis("off")


def blend(image: np.ndarray, score_map: np.ndarray, limit: float) -> np.ndarray:
    """Lays a class's score map over an image; where the map is 0 the image is unchanged.

    Args:
        image: ``(height, width)`` or ``(height, width, 3)``, uint8.
        score_map: ``(height', width')``.
        limit: the value of the strongest color; the same for all maps that are to be compared.

    Returns:
        ``(height, width, 3)`` uint8, with a longer side of 224 pixels.
    """
    from matplotlib import colormaps

    scale = PIXELS / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    # Enlarged pixels stay squares; a photo is reduced smoothly.
    filter_ = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BILINEAR
    large = np.asarray(Image.fromarray(image).convert("RGB").resize(size, filter_))
    smooth = np.asarray(Image.fromarray(score_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)) / limit
    color = colormaps[COLORS](smooth / 2 + 0.5)[..., :3] * 255
    opacity = 0.75 * np.clip(np.abs(smooth), 0, 1)[..., None]
    return (large * (1 - opacity) + color * opacity).round().astype(np.uint8)


def escape(text: str) -> str:
    """``text`` as matplotlib draws it literally: what stands between two dollar signs would be a formula."""
    return text.replace("$", r"\$")


def largest_magnitude(score_maps: np.ndarray) -> float:
    """The largest magnitude in several maps ``(maps, height, width)``, for one color scale; 1 where all are 0."""
    return float(np.abs(score_maps).max(initial=0)) or 1.0


def ignore_local_matplotlibrc() -> None:
    """Undoes what a ``matplotlibrc`` in the working directory has set: that may be a folder from elsewhere.

    Such a file could start LaTeX.
    """
    import matplotlib

    if Path(matplotlib.matplotlib_fname()).absolute().parent == Path.cwd():
        matplotlib.rcdefaults()
        matplotlib.use("agg")
