"""The data sets: their classes, where their files are downloaded from, and whether the files are intact.

Imports neither torch nor NumPy before files are downloaded or read: what is missing is reported within a second.
"""

import contextlib
import http.client
import socket
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from nin.config.data_sets import DATA_SETS, AnyData, raw_folder
from nin.config.errors import printable
from nin.config.schema import Data, FolderData, MachineError, OwnData, Settings, UserError
from nin.config.trust import with_local_root
from nin.data.folder import hash_file, hash_once
from nin.data.published import FILES, PUBLISHED, PUBLISHED_PACKED

if TYPE_CHECKING:
    import numpy as np

# Seconds for which a mirror may send nothing.
_SILENCE = 30.0
# The file to which the sums of unpacked files are written with the files, where none are published: KMNIST has only
# those of the packed files, and garments are generated.
RECORDED = "SHA256SUMS"


@dataclass(frozen=True)
class DatasetInfo:
    """The classes and the format of the images of a data set.

    Attributes:
        class_names: one per class; the label of an image is the index of its class.
        channels: of an image.
        stored_size: height and width of an image in memory, in pixels.
    """

    class_names: tuple[str, ...]
    channels: int
    stored_size: int


def describe(data: AnyData) -> DatasetInfo:
    """The classes and images of the data set that ``data`` names.

    Reads no file, except of ``data=folder``, whose images are decoded if they have not been. A data module of the
    user's own is built.
    """
    if isinstance(data, OwnData):
        from nin.data.own import build_own_data

        module: Any = build_own_data(data)
        return DatasetInfo(tuple(map(str, module.class_names)), module.channels, data.image_size)
    if isinstance(data, FolderData):
        from nin.data.splits import open_folder

        found = open_folder(data)
        return DatasetInfo(found.class_names, found.channels, found.stored_size)
    known = DATA_SETS[data.name]
    return DatasetInfo(known.class_names, known.channels, known.stored_size)


def require_same_classes(found: Iterable[str], trained: object) -> None:
    """Raises UserError if labels do not mean the same to a data set and to a network.

    Args:
        found: the class names of the data set; a folder may be given later than the network was trained.
        trained: the class names that are stored with the network.
    """
    names = list(found)
    if names != trained:
        stored = trained if isinstance(trained, list) else []
        ours, theirs = (", ".join(printable(str(name)) for name in each) for each in (names, stored))
        # In a folder with test images only, which has no images of some classes.
        are_missing = set(names) < set(map(str, stored))
        remedy = "; a folder also needs a folder for each of the others, which may be empty" if are_missing else ""
        raise UserError(f"data: its classes are {ours}; the network was trained for {theirs or 'others'}{remedy}")


def prepare(data: AnyData) -> None:
    """Downloads or generates the missing files of ``data``, and verifies the SHA-256 of all; decodes a folder's images.

    Raises:
        UserError: names the file that is missing, cut off or altered, or the folder that can't be written, and says
            what to do.
    """
    if isinstance(data, OwnData):
        return  # Lightning calls its prepare_data()
    if isinstance(data, FolderData):
        from nin.data.splits import open_folder

        open_folder(data, again=True)
        return
    folder = raw_folder(data)
    try:
        if _missing_files(folder, data):
            with _write_atomically(folder) as new:
                missing = _missing_files(folder, data)  # another process may have written them
                if missing and data.name == "garments":
                    from nin.data import garments

                    garments.write_files(new)
                elif missing:
                    _download(missing, new, data)
                if missing and data.name not in PUBLISHED:
                    sums = "".join(f"{hash_file(new / name)}  {name}\n" for name in FILES)
                    (new / RECORDED).write_text(sums)
        _verify(folder, data)
    except OSError as error:
        raise MachineError(f"{error.filename}: can't be read ({error.strerror})") from error


def with_found_root(stored: Settings) -> Settings:
    """``stored`` if nothing is missing in its ``data.root``, else with this machine's: files are written only there."""
    with contextlib.suppress(OSError):  # the folder of another user
        if not isinstance(stored.data, Data) or not _missing_files(raw_folder(stored.data), stored.data):
            return stored
    return with_local_root(stored)


def load(data: Data, part: str) -> "tuple[np.ndarray, np.ndarray]":
    """Reads images ``(count, 28, 28)`` uint8, of CIFAR-10 ``(count, 32, 32, 3)``, and labels ``(count,)`` int64.

    torchvision's dataset classes are not used: they need torch, and prefer a ``processed/training.pt`` beside the
    files, which no checksum covers.

    Args:
        part: "train" or "test".

    Raises:
        UserError: if a file is no IDX file or cut off, labels and images differ in number, or a label names no class.
    """
    folder = raw_folder(data)
    if data.name == "cifar10":
        from nin.data import cifar10

        return cifar10.read(folder / cifar10.ARCHIVE, part)
    from nin.data.idx import read_idx

    prefix = {"train": "train", "test": "t10k"}[part]
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte", dimensions=1).astype("int64")
    remedy = "remove the folder and run the command again"
    if len(images) != len(labels):
        raise UserError(f"{folder}: {prefix} has {len(images)} images and {len(labels)} labels; {remedy}")
    classes = len(DATA_SETS[data.name].class_names)
    if len(labels) and labels.max() >= classes:
        raise UserError(f"{folder}: {prefix} has the label {labels.max()}, and there are {classes} classes; {remedy}")
    return images, labels


def _missing_files(folder: Path, data: Data) -> list[str]:
    """The names of the files to download or to generate."""
    if data.name in PUBLISHED:
        return [name for name in _files_of(data) if not (folder / name).exists()]
    # Files without recorded sums can't be verified, so they count as missing.
    return [] if all((folder / name).exists() for name in (*FILES, RECORDED)) else list(FILES)


def _files_of(data: Data) -> tuple[str, ...]:
    """The names of a data set's files: the four IDX files, or CIFAR-10's archive."""
    return tuple(PUBLISHED.get(data.name, FILES))


@contextlib.contextmanager
def _write_atomically(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder whose files are moved into ``folder`` at the end. Other processes wait meanwhile.

    If that fails no folders are left that were not there before.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock), tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as new:
            yield Path(new)
            # The recorded sums last: they declare all others complete.
            for file in sorted(Path(new).iterdir(), key=lambda file: file.name == RECORDED):
                file.replace(folder / file.name)
            made = []
    except OSError as error:
        raise MachineError(
            f"data.root={folder.parents[1]}: {folder} can't be written ({error.strerror}), and the data set is not "
            "complete; free space on the disk, or set data.root (for a new run the variable NIN_DATA too) to a folder "
            "that can be written or that has the files"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            if made:
                lock.unlink(missing_ok=True)
            for parent in made:
                parent.rmdir()


def _download(names: list[str], folder: Path, data: Data) -> None:
    """Downloads ``names``, unpacked, into ``folder``, each from the first mirror that has the published file."""
    try:
        from torchvision.datasets.utils import download_url, extract_archive
    except ModuleNotFoundError as error:  # an installation that only uses exports may lack it
        where = f"copy the files of {data.name} to {raw_folder(data)}, or set NIN_DATA or data.root"
        raise MachineError(
            f"{names[0]} of {data.name} is missing, and a download needs torchvision; {where}"
        ) from error

    for name in names:
        file = folder / name
        packed = file if file.suffix == ".gz" else folder / f"{name}.gz"
        failures: dict[str, list[str]] = {}  # the mirrors with each reason
        for mirror in data.mirrors:
            try:
                with _limit_silence():
                    download_url(f"{mirror.rstrip('/')}/{packed.name}", str(folder))
                if data.name in PUBLISHED_PACKED and hash_file(packed) != PUBLISHED_PACKED[data.name][name]:
                    raise ValueError(f"sent a {packed.name} that is not the published one")
                if packed != file:
                    extract_archive(str(packed), str(folder), remove_finished=True)
                if data.name in PUBLISHED and hash_file(file) != PUBLISHED[data.name][name]:
                    raise ValueError(f"sent a {name} that is not the published one")
                break
            # No network, a refusal, no address, a transfer that was cut off, and what is no gzip file.
            except (OSError, RuntimeError, EOFError, ValueError, http.client.HTTPException, zlib.error) as error:
                failures.setdefault(str(error), []).append(mirror)
            for rest in (file, packed):  # torchvision would take it for the next mirror's file
                rest.unlink(missing_ok=True)
        else:
            reasons = [f"{', '.join(mirrors)}: {reason}" for reason, mirrors in failures.items()]
            tried = "\n  ".join(reasons) or "data.mirrors is empty"
            sums = [] if data.name in PUBLISHED else [f"{RECORDED}, made there by: sha256sum *-ubyte > {RECORDED}"]
            needed, raw = "\n  ".join([*_files_of(data), *sums]), raw_folder(data)
            raise MachineError(
                f"{name} of {data.name} is not in {raw} and could not be downloaded:\n  {tried}\nWithout a network "
                f"connection, copy these {'' if packed == file else 'unpacked '}files\n  {needed}\ninto {raw}, or set "
                f"NIN_DATA to the folder that holds {raw.parent.name}/raw; or use data=garments, which needs no "
                "download."
            )


@contextlib.contextmanager
def _limit_silence() -> Iterator[None]:
    """Lets new connections raise TimeoutError after `_SILENCE`: those of torchvision would wait without a limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _verify(folder: Path, data: Data) -> None:
    """Compares the files with their published or recorded sums, at the start of every process: 0.1 s for 55 MB.

    Nothing is kept on disk: a byte can be altered with size and modification time as they were.
    """
    known = PUBLISHED.get(data.name) or _read_recorded(folder / RECORDED)
    kind = "published" if data.name in PUBLISHED else "recorded"
    for name in _files_of(data):
        if hash_once(folder / name) != known.get(name):
            raise MachineError(
                f"{folder / name}: not the {kind} file ({(folder / name).stat().st_size:,} bytes, its SHA-256 is not "
                f"{known.get(name, 'known')[:12]}…): it was cut off or altered; remove it and run the command again, "
                "which restores it, or copy an intact one there"
            )


def _read_recorded(path: Path) -> dict[str, str]:
    lines = path.read_text(errors="replace").splitlines()
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
