"""IDX, the file format of MNIST and its successors: a big-endian header, then unsigned bytes."""

from pathlib import Path

import numpy as np

from nin.config.schema import UserError

IMAGES, LABELS = 0x0803, 0x0801  # unsigned bytes in three dimensions, in one


def read_images(path: Path) -> np.ndarray:
    """``(count, height, width)`` uint8. Raises UserError on a file that is cut off, too long or no IDX images."""
    return _read(path, IMAGES)


def read_labels(path: Path) -> np.ndarray:
    """``(count,)`` uint8. Raises UserError on a file that is cut off, too long or no IDX labels."""
    return _read(path, LABELS)


def _read(path: Path, magic: int) -> np.ndarray:
    content = path.read_bytes()
    dimensions = magic & 0xFF
    header = np.frombuffer(content[: 4 + 4 * dimensions], dtype=">u4", count=min(len(content) // 4, 1 + dimensions))
    if len(header) <= dimensions or header[0] != magic:
        raise UserError(f"{path}: not an IDX file of {'images' if magic == IMAGES else 'labels'}")
    shape = tuple(int(n) for n in header[1:])
    values = len(content) - header.nbytes
    if values != np.prod(shape):
        what = "cut off" if values < np.prod(shape) else "too long"
        raise UserError(
            f"{path}: {what}: its header promises {np.prod(shape)} bytes of {shape}, it holds {values}; remove it and "
            "say the command again, which brings a good one"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header.nbytes).reshape(shape)


def write(path: Path, values: np.ndarray) -> None:
    """Writes ``(count, height, width)`` images or ``(count,)`` labels, uint8."""
    magic = IMAGES if values.ndim == 3 else LABELS
    header = np.array([magic, *values.shape], dtype=">u4")
    path.write_bytes(header.tobytes() + np.ascontiguousarray(values, dtype=np.uint8).tobytes())
