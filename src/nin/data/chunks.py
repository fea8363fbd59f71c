"""Some files of a folder, which one process decodes one after the other.

Imports NumPy and Pillow only, since each process that decodes imports this module.
"""

import errno
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from nin.data.decoding import ImageError, has_color, open_image, to_pixels

# How the reason begins where a file can't be read for now, whatever its content.
NOT_NOW = "can't be read now"


@dataclass(frozen=True)
class Chunk:
    """Some files of a folder, which one process decodes one after the other.

    Attributes:
        root: the folder.
        names: of the files, relative to ``root``; empty ones are left out.
        images: the file to which the pixels are written, ``(size, size, channels)`` for each name; None: nowhere.
        start: the row of ``images`` that is the first one's.
        size: height and width to which images are brought, in pixels.
        fit: "crop", "pad" or "stretch", as in `to_pixels`.
        channels: 1 or 3.
        search: the number of images, the first ones, that are searched for color.
    """

    root: str
    names: list[str]
    images: Path | None
    start: int
    size: int
    fit: str
    channels: int
    search: int


def decode_chunk(chunk: Chunk) -> tuple[dict[str, str], bool]:
    """Decodes the files of ``chunk``; returns the broken ones with the reason, and whether any image has color."""
    # All images one below the other: Pillow copies pixels between images faster than to bytes.
    pixels = Image.new("L" if chunk.channels == 1 else "RGB", (chunk.size, chunk.size * len(chunk.names)))
    broken, color = {}, False
    for i, name in enumerate(chunk.names):
        if not name:
            continue
        try:
            image = to_pixels(open_image(f"{chunk.root}/{name}"), chunk.size, chunk.fit)
        except ImageError as error:
            broken[name] = f"{NOT_NOW} ({error})" if _may_succeed_later(error.__cause__) else str(error)
            continue
        color = color or (i < chunk.search and has_color(image))
        pixels.paste(image, (0, i * chunk.size))  # converts its mode
    if chunk.images is not None:
        with chunk.images.open("r+b") as file:
            file.seek(chunk.start * chunk.size**2 * chunk.channels)
            file.write(pixels.tobytes())
    return broken, color


def _may_succeed_later(cause: BaseException | None) -> bool:
    """Whether another attempt may succeed. A damaged file lets Pillow seek to a place before its start (EINVAL)."""
    return isinstance(cause, MemoryError) or (
        isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL, errno.EOVERFLOW)
    )
