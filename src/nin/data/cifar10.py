"""CIFAR-10 (Krizhevsky 2009), read from its published archive without running any code that a file names."""

import functools
import hashlib
import http.client
import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from nin.config.schema import UserError

ARCHIVE = "cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
SIZE = 32
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "t10k": ["test_batch"]}


def download(folder: Path, mirrors: list[str]) -> None:
    """Downloads the archive from the first mirror that has the published one.

    Raises:
        UserError: lists what each mirror answered.
    """
    from torchvision.datasets.utils import download_url

    failures = []
    for mirror in mirrors:
        try:
            download_url(f"{mirror.rstrip('/')}/{ARCHIVE}", str(folder), md5=MD5)
            return
        except (OSError, RuntimeError, EOFError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{mirror}: {error}")
        (folder / ARCHIVE).unlink(missing_ok=True)
    tried = "\n  ".join(failures) or "data.mirrors is empty"
    raise UserError(
        f"{ARCHIVE} of cifar10 could not be downloaded:\n  {tried}\nWithout network: copy it into "
        "CIFAR10/raw in data.root, or use data=folder with images of your own"
    )


def verify(archive: Path) -> None:
    """Compares the archive with its published MD5.

    Raises:
        UserError: if it is another file.
    """
    state = archive.stat()
    found = _md5_of(archive, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    if found != MD5:
        raise UserError(
            f"{archive}: not the published file (its MD5 is {found[:12]}…, not {MD5[:12]}…): it was cut off or "
            "altered; remove it and run the command again, which restores it"
        )


@functools.lru_cache(maxsize=4)
def _md5_of(archive: Path, size: int, modified: int, changed: int) -> str:
    """The sum of a file in this state, computed once per process: a sweep prepares the data of all its jobs."""
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def read(archive: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads images ``(count, 32, 32, 3)`` uint8 and labels ``(count,)`` int64.

    Args:
        part: "train" or "t10k", the test images.

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


# Of a file that is no archive, cut off, or has other content.
_ERRORS = (
    KeyError, TypeError, ValueError, AttributeError, EOFError, zlib.error, pickle.UnpicklingError, tarfile.TarError,
)  # fmt: skip


class _ArrayUnpickler(pickle.Unpickler):
    """Loads dictionaries, lists, numbers, bytes and NumPy arrays, and refuses all else: MD5 does not exclude code."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names of an array's pickle. The archive is older than NumPy 2, which renamed numpy.core."""
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if (module, name) == ("_codecs", "encode"):  # of bytes, in pickles that Python 3 wrote in an old protocol
            return lambda text, encoding: text.encode("latin-1")
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """The array that an unpickler fills; NumPy's own function for this is private."""
    return np.ndarray.__new__(np.ndarray, (0,), dtype=np.uint8)
