"""CIFAR-10 (Krizhevsky 2009), read from its published archive without running any code that a file names."""

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from nin.config.schema import UserError

ARCHIVE = "cifar-10-python.tar.gz"
SIZE = 32
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
# Raised for a file that is no archive, is cut off, or has other content.
_ERRORS = (
    KeyError, TypeError, ValueError, AttributeError, EOFError, zlib.error, pickle.UnpicklingError, tarfile.TarError,
)  # fmt: skip


def read(archive: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads images ``(count, 32, 32, 3)`` uint8 and labels ``(count,)`` int64.

    Args:
        part: "train" or "test".

    Raises:
        UserError: if the archive lacks a file, or one has other content than images and labels.
    """
    images, labels = [], []
    try:
        with tarfile.open(archive) as files:
            for name in _BATCHES[part]:
                member = files.extractfile(f"cifar-10-batches-py/{name}")
                if member is None:
                    raise KeyError(name)
                batch = _ArrayUnpickler(io.BytesIO(member.read()), encoding="bytes").load()
                images.append(batch[b"data"].reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1))
                labels.append(np.array(batch[b"labels"], dtype=np.int64))
    except _ERRORS as error:
        raise UserError(
            f"{archive}: not the archive of CIFAR-10 ({error}); remove it and run the command again"
        ) from error
    return np.concatenate(images), np.concatenate(labels)


class _ArrayUnpickler(pickle.Unpickler):
    """Loads dictionaries, lists, numbers, bytes and NumPy arrays, and refuses all else, which could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names of an array's pickle. The archive is older than NumPy 2, which renamed numpy.core."""
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if (module, name) == ("_codecs", "encode"):  # how Python 3 pickles bytes in an old protocol
            return lambda text, encoding: text.encode("latin-1")
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """The array that an unpickler fills; NumPy's own function for this is private."""
    return np.ndarray.__new__(np.ndarray, (0,), dtype=np.uint8)
