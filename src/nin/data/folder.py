"""A folder of images, one folder per class: its files, and what is wrong with them. Imports no torch, decodes nothing.

The layout is that of torchvision's ImageFolder: ``train/<class>/``, and ``val/<class>/`` and ``test/<class>/`` where
they exist. Folders within a class's folder belong to that class.
"""

import contextlib
import functools
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nin.config.errors import printable
from nin.config.schema import FolderData, MachineError

PARTS = ("train", "val", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SHOWN = 200  # so many faults of one folder are listed: a message of thousands of lines helps nobody

REMEDY = "repair or remove the files, or leave them out with data.skip_broken=true"


class ImageFile(NamedTuple):
    """One file as it was when the folder was listed.

    Attributes:
        name: path relative to the root.
        label: the index of its class.
        size: in bytes.
        modified_ns: time of the last modification, in nanoseconds since 1970.
    """

    name: str
    label: int
    size: int
    modified_ns: int


@dataclass
class Listing:
    """The files of a folder.

    Attributes:
        class_names: names of the folders in ``train/``, or without it in ``test/``, sorted; the label of an image is
            the index of its class.
        files: of each part, sorted by name.
        broken: names of files that can't be used, with the reason.
        other_files: what is left out: files without the suffix of an image, and folders beside ``train/``.
        faults: what is wrong with the layout: empty and unreadable folders, classes that only the validation or the
            test images have, a single class, links in circles.
    """

    class_names: tuple[str, ...] = ()
    files: dict[str, list[ImageFile]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    other_files: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def list_images(data: FolderData) -> Listing:
    """Lists the images of ``data.root`` and the faults of its layout.

    Raises:
        UserError: if it has neither ``train/`` nor ``test/``, which is enough to test a network.
    """
    return _Scan(Path(data.root), Path(data.cache) if data.cache else None).run()


def require_usable(listing: Listing, broken: dict[str, str], data: FolderData) -> None:
    """Checks that the layout has no faults and no file is broken, or that the others suffice with ``data.skip_broken``.

    Args:
        broken: names of files that can't be used, with the reason.

    Raises:
        UserError: names every fault and every broken file, or every class without a usable training image.
    """
    files = [] if data.skip_broken else [f"{printable(name)}: {reason}" for name, reason in broken.items()]
    if faults := [*listing.faults, *files]:
        remedies = [f"{_count(listing.faults, 'fault')} of the layout; correct the folder"] if listing.faults else []
        remedies += [f"{_count(files, 'broken file')}; {REMEDY}"] if files else []
        raise folder_error(data.root, [*faults[:_SHOWN], *_more(faults)], ", and ".join(remedies))
    empty = []
    if "train" in listing.files:
        left = {file.label for file in listing.files["train"] if file.name not in broken}
        absent = [name for i, name in enumerate(listing.class_names) if i not in left]
        empty = [f"train/{printable(name)}: no usable image" for name in absent]
    empty += [
        f"{part}/: no usable image" for part in PARTS[1:]
        if part in listing.files and all(file.name in broken for file in listing.files[part])
    ]  # fmt: skip
    if empty:
        raise folder_error(data.root, empty, "every class needs training images")


def folder_error(root: str, faults: list[str], remedy: str) -> MachineError:
    """The error about a folder of images: the remedy, then one line for each fault."""
    return MachineError("\n    ".join([f"data.root={printable(root)}: {remedy}", *faults]))


def missing_train_error(root: str) -> MachineError:
    """The error about a folder whose images are needed for training, or are not there at all."""
    return MachineError(
        f"data.root={printable(root)}: has no folder train; it must hold train/<class>/… with the images of each "
        "class, and may hold val/<class>/… and test/<class>/… (test alone is enough for nin eval)"
    )


def _count(faults: list[str], noun: str) -> str:
    return f"{len(faults)} {noun}{'s' * (len(faults) > 1)}"


def _more(faults: list[str]) -> list[str]:
    return [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []


class _Scan:
    """One listing of a folder, with the faults found so far.

    Args:
        cache: the folder of decoded images, which may be in ``root``.
    """

    def __init__(self, root: Path, cache: Path | None):
        self.root, self.cache, self.listing = root, cache, Listing()
        self.faults = self.listing.faults

    def run(self) -> Listing:
        if not self.root.is_dir():
            missing = "not a folder" if self.root.exists() else "no such folder"
            raise MachineError(f"data.root={printable(str(self.root))}: {missing}; it must hold train/<class>/…")
        first = next((part for part in ("train", "test") if (self.root / part).is_dir()), None)
        if first is None:
            raise missing_train_error(str(self.root))
        names = self._class_folders(first)
        self.listing.class_names = tuple(names)
        if len(names) == 1:
            self.faults.append(f"{first}/{printable(names[0])}: the only class; a classifier needs two or more")
        elif not names:
            self.faults.append(f"{first}/: has no folders; each class needs one")
        for part in PARTS:
            if (self.root / part).is_dir():
                self._list_part(part, names if part == first else self._class_folders(part))
            elif os.path.lexists(self.root / part):  # its images would be split off the training images instead
                self.faults.append(f"{part}: not a folder, or a link to nothing; correct or remove it")
        self._list_other_folders()
        return self.listing

    def _list_other_folders(self) -> None:
        cache = _identity(self.cache) if self.cache else None
        with contextlib.suppress(OSError):  # what can't be read here is left out as well
            folders = sorted(path for path in self.root.iterdir() if path.is_dir() and _identity(path) != cache)
            others = [path.name for path in folders if path.name not in PARTS and path.name[0] != "."]
            self.listing.other_files += [f"{name}/" for name in others]

    def _class_folders(self, part: str) -> list[str]:
        """The names of the folders in ``part``, sorted; images beside them belong to no class."""
        names = []
        for entry, is_folder in self._entries(part):
            if is_folder:
                names.append(entry.name)
                if not _is_utf8(entry.name):
                    self.faults.append(f"{part}/{printable(entry.name)}: the class's name is not UTF-8; rename it")
            elif entry.name.lower().endswith(SUFFIXES):
                self.listing.broken[f"{part}/{entry.name}"] = "in no class's folder"
            else:
                self.listing.other_files.append(f"{part}/{entry.name}")
        return names

    def _list_part(self, part: str, names: list[str]) -> None:
        files: list[ImageFile] = []
        for name in names:
            found: list[ImageFile] = []
            faults = len(self.faults)
            if name in self.listing.class_names:
                label = self.listing.class_names.index(name)
                found = list(self._images(f"{part}/{name}", label, frozenset([_identity(self.root / part)])))
                if part == "train" and not found and len(self.faults) == faults:  # an unreadable folder is named once
                    self.faults.append(f"train/{printable(name)}: no images; a class needs training images")
            else:
                self.faults.append(f"{part}/{printable(name)}: a class without training images (it is not in train/)")
            files += found
        if part != "train" and not files:
            self.faults.append(f"{part}/: no images; fill it, or remove it")
        self.listing.files[part] = files

    def _images(self, folder: str, label: int, above: frozenset[tuple[int, int]]) -> Iterator[ImageFile]:
        """The images in ``folder`` and in all folders in it.

        Args:
            above: device and inode of the folders that lead here, to notice links in circles.
        """
        here = _identity(self.root / folder)
        if here in above:
            self.faults.append(f"{printable(folder)}: a link to a folder that contains it")
            return
        for entry, is_folder in self._entries(folder):
            name = f"{folder}/{entry.name}"
            if is_folder:
                yield from self._images(name, label, above | {here})
            elif not entry.name.lower().endswith(SUFFIXES):
                self.listing.other_files.append(name)
            elif not _is_utf8(entry.name):
                self.listing.broken[name] = "the name is not UTF-8"
                yield ImageFile(name, label, 0, 0)
            else:
                yield self._image(entry, name, label)

    def _image(self, entry: os.DirEntry, name: str, label: int) -> ImageFile:
        try:
            state = entry.stat()
        except OSError as error:
            self.listing.broken[name] = f"a link to nothing ({error.strerror})"
            return ImageFile(name, label, 0, 0)
        if not stat.S_ISREG(state.st_mode):  # reading a pipe would wait forever
            self.listing.broken[name] = "not a regular file"
        elif not state.st_size:
            self.listing.broken[name] = "has no bytes"
        return ImageFile(name, label, state.st_size, state.st_mtime_ns)

    def _entries(self, folder: str) -> Iterator[tuple[os.DirEntry, bool]]:
        """The entries of a folder, sorted by name, and whether each is a folder. Hidden ones are left out."""
        try:
            with os.scandir(self.root / folder) as found:
                entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            self.faults.append(f"{printable(folder)}: can't be read ({error.strerror})")
            return
        for entry in entries:
            try:
                yield entry, entry.is_dir()
            except OSError as error:  # a link to itself
                if entry.name.lower().endswith(SUFFIXES):
                    yield entry, False
                else:
                    self.faults.append(f"{printable(f'{folder}/{entry.name}')}: can't be read ({error.strerror})")


def _identity(folder: Path) -> tuple[int, int]:
    try:
        state = folder.stat()
    except OSError:  # reported when its entries are read
        return (-1, -1)
    return state.st_dev, state.st_ino


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def hash_file(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_once(path: Path) -> str:
    """The SHA-256 of a file, computed once per process while it is unchanged: each job of a sweep needs it."""
    state = path.stat()
    return _hash_file_in_state(path, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.lru_cache(maxsize=64)
def _hash_file_in_state(path: Path, size: int, modified_ns: int, changed_ns: int) -> str:
    return hash_file(path)
