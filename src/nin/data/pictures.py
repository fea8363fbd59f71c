"""An image with a score map over it, drawn into axes of matplotlib. Imports no torch."""

from typing import Any

import numpy as np
from PIL import Image

PIXELS = 224  # a map of 3x3 values is enlarged to this many a side, so that its overlay is smooth


def draw_image(axes: Any, image: np.ndarray) -> None:
    """Draws an image ``(height, width)`` or ``(height, width, 3)``, uint8 or float from 0 to 1, without ticks."""
    if image.dtype == np.uint8 and max(image.shape[:2]) > 2 * PIXELS:
        small = Image.fromarray(image)
        small.thumbnail((2 * PIXELS, 2 * PIXELS))
        image = np.asarray(small)
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255 if image.dtype == np.uint8 else 1} if image.ndim == 2 else {}
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), **grey)
    axes.axis("off")


def draw_score_map(axes: Any, image: np.ndarray, score_map: np.ndarray, limit: float) -> Any:
    """Draws a class's score map ``(height, width)`` over the image; returns what a colour bar needs.

    Red raises the class's logit, blue lowers it; where the map is 0 the image is seen as it is.

    Args:
        limit: the value of the strongest colour; the same for all maps that are to be compared.
    """
    draw_image(axes, image)
    smooth = np.asarray(
        Image.fromarray(score_map.astype(np.float32)).resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)
    )
    height, width = image.shape[:2]
    return axes.imshow(
        smooth,
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        alpha=np.clip(np.abs(smooth) / limit, 0, 1) * 0.75,
        extent=(0, width, height, 0),
    )


def strongest(score_maps: np.ndarray) -> float:
    """The limit of one colour scale for several maps; 1 where all are 0."""
    return float(np.abs(score_maps).max(initial=0)) or 1.0
