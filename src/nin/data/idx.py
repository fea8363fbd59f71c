"""The IDX format, in which Fashion-MNIST, MNIST and KMNIST are published. Imports no torch."""

import math
from pathlib import Path

import numpy as np

from nin.config.schema import UserError
from nin.data.decoding import ImageError

# The first bytes of a file: unsigned bytes in three dimensions, and in one.
IMAGES, LABELS = b"\x00\x00\x08\x03", b"\x00\x00\x08\x01"


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The values of a data set's file, uint8: ``(count, height, width)`` images or ``(count,)`` labels.

    Raises:
        UserError: if it can't be read, is no IDX file, cut off or too long, or has another number of ``dimensions``.
    """
    try:
        values = parse_idx(path.read_bytes())
        if values.ndim != dimensions:
            raise ImageError(f"{values.ndim} dimensions instead of {dimensions}")
    except OSError as error:
        raise UserError(
            f"{path}: can't be read ({error.strerror}); run the command again, or prepare_data() in Python, which "
            "restores a file that is missing"
        ) from error
    except ImageError as error:
        raise UserError(
            f"{path}: not an IDX file, cut off or too long ({error}); remove it and run the command again, which "
            "restores it"
        ) from error
    return values


def parse_idx(content: bytes) -> np.ndarray:
    """The values of an IDX file: ``(count, height, width)`` images or ``(count,)`` labels, uint8.

    Raises:
        ImageError: if the content is neither, cut off or too long.
    """
    if content[:4] not in (IMAGES, LABELS) or len(content) < 4 + 4 * content[3]:
        raise ImageError("not an IDX file of images or labels")
    shape = tuple(int(n) for n in np.frombuffer(content, dtype=">u4", offset=4, count=content[3]))
    start = 4 + 4 * len(shape)
    if (values := math.prod(shape)) != len(content) - start:
        raise ImageError(f"the header declares {values} values of {shape}, the file holds {len(content) - start}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()  # frombuffer's array is read-only
