"""Where a data set's four IDX files come from, and that they are whole. Imports no torch unless files are fetched."""

import contextlib
import hashlib
import http.client
import json
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from nin.config.schema import Data, UserError
from nin.runs.folder import write_atomically

if TYPE_CHECKING:
    import numpy as np

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# SHA-256 of the four unpacked files of Fashion-MNIST as published by Zalando Research.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


@dataclass(frozen=True)
class DatasetInfo:
    class_names: tuple[str, ...]
    channels: int
    stored_size: int


def describe(data: Data) -> DatasetInfo:
    return DatasetInfo(CLASS_NAMES, 1, 28)


def prepare(data: Data) -> None:
    """Sees to it that the files of ``data`` are there and whole: fetches or draws what is missing.

    Raises:
        UserError: names the file that is missing, cut off or altered, or the folder that can't be written, and says
            what to do.
    """
    folder = raw_folder(data)
    try:
        if any(not (folder / name).exists() for name in FASHION_MNIST):
            with _filled_by_one(folder) as fresh:
                missing = [name for name in FASHION_MNIST if not (folder / name).exists()]
                if missing and data.name == "garments":
                    from nin.data import garments

                    garments.draw(fresh)
                elif missing:
                    _fetch(missing, fresh, data)
        if data.name == "fashion_mnist":
            _verify(folder)
        else:
            for part in ("train", "t10k"):
                load(data, part)
    except OSError as error:
        raise UserError(f"{error.filename}: can't be read ({error.strerror})") from error


def raw_folder(data: Data) -> Path:
    """Where torchvision keeps them too: ``<root>/FashionMNIST/raw``."""
    return Path(data.root) / {"fashion_mnist": "FashionMNIST", "garments": "Garments"}[data.name] / "raw"


def load(data: Data, part: str) -> "tuple[np.ndarray, np.ndarray]":
    """Images ``(count, 28, 28)`` and labels ``(count,)``, uint8, of ``part`` "train" or "t10k" (the test images).

    Raises:
        UserError: if a file is cut off, or there are not as many labels as images.
    """
    from nin.data import idx

    folder = raw_folder(data)
    images = idx.read_images(folder / f"{part}-images-idx3-ubyte")
    labels = idx.read_labels(folder / f"{part}-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise UserError(
            f"{folder}: {part} has {len(images)} images and {len(labels)} labels, and there must be as many of both; "
            "remove the folder and say the command again"
        )
    return images, labels


@contextlib.contextmanager
def _filled_by_one(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files go into ``folder`` at the end; one process fills it while others wait.

    What could not be filled is left as it was found: no empty folders stay behind.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock), tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as fresh:
            yield Path(fresh)
            for file in Path(fresh).iterdir():
                file.replace(folder / file.name)
            made = []
    except OSError as error:
        raise UserError(
            f"data.root={folder.parents[1]}: {folder} can't be written ({error.strerror}), and the data set is not "
            "all there; make room, or set data.root (for a new run the variable NIN_DATA too) to a folder that can be "
            "written or that has the files"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            if made:
                lock.unlink(missing_ok=True)
            for parent in made:
                parent.rmdir()


def _fetch(names: list[str], folder: Path, data: Data) -> None:
    """Downloads and unpacks ``names`` into ``folder``, from the first mirror that has each whole."""
    from torchvision.datasets.utils import download_and_extract_archive

    for name in names:
        failures = []
        for mirror in data.mirrors:
            try:
                download_and_extract_archive(f"{mirror.rstrip('/')}/{name}.gz", str(folder), remove_finished=True)
                if _sha256(folder / name) == FASHION_MNIST[name]:
                    break
                failures.append(f"{mirror}: sent a {name} that is not the published one")
            # No network, a refusal, no address, a transfer that was cut off, and what is no gzip file.
            except (OSError, RuntimeError, EOFError, ValueError, http.client.HTTPException, zlib.error) as error:
                failures.append(f"{mirror}: {error}")
            for left in (folder / name, folder / f"{name}.gz"):  # torchvision would take it for the next mirror's
                left.unlink(missing_ok=True)
        else:
            tried = "\n  ".join(failures) or "data.mirrors is empty"
            raise UserError(
                f"{name} of Fashion-MNIST is not in {raw_folder(data)} and could not be downloaded:\n  {tried}\n"
                "Without network: copy the four unpacked files\n  "
                + "\n  ".join(FASHION_MNIST)
                + f"\ninto {raw_folder(data)}, or set NIN_DATA to the folder that holds FashionMNIST/raw; "
                "or use data=garments, which needs no download."
            )


def _verify(folder: Path) -> None:
    """Compares the files with the published sums, once: the answer is kept beside them."""
    seal = folder / "verified.json"
    sizes = {name: [s.st_size, s.st_mtime_ns] for name in FASHION_MNIST if (s := (folder / name).stat())}
    with contextlib.suppress(OSError, ValueError):
        if json.loads(seal.read_text()) == sizes:
            return
    for name, published in FASHION_MNIST.items():
        if _sha256(folder / name) != published:
            raise UserError(
                f"{folder / name}: not the published file ({sizes[name][0]:,} bytes, its SHA-256 is not "
                f"{published[:12]}…): it was cut off or altered; remove it and say the command again, which downloads "
                "it anew, or copy a good one there"
            )
    with contextlib.suppress(OSError):  # a folder that can only be read is looked through every time
        if folder.stat().st_mode & 0o222:  # not os.access: root may write where nobody is did_you_mean to
            write_atomically(seal, json.dumps(sizes))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
