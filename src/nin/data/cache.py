"""The decoded images of a folder: one file of uint8 pixels, written once and memory-mapped. Imports no torch.

A cache is a folder with ``images.bin`` (the pixels of all images: training, then validation, then test images),
``labels.npy`` and ``about.json``. Its name is the SHA-256 of what determines the pixels: names, sizes and modification
times of the files, the settings, the version of Pillow and, in a place that folders may share, the path of the folder.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from filelock import FileLock

from nin.config.errors import printable
from nin.config.schema import FolderData, MachineError, UserError
from nin.data.chunks import NOT_NOW
from nin.data.folder import PARTS, ImageFile, Listing, folder_error, hash_file, hash_once, list_images, require_usable
from nin.data.parallel import decode_folder

_FORMAT = 4  # the version of a cache; a change of the decoding needs another number
_HASHED = 2**30  # a larger file is not read to verify it; its size is compared
# The attributes of a `Cache` that about.json stores.
_STORED = ("channels", "counts", "broken", "fingerprint", "stored_size")


@dataclass(frozen=True)
class Cache:
    """The decoded images of a folder.

    Attributes:
        path: the folder of the cache.
        class_names: one per class, in the order of the labels.
        channels: 1 or 3.
        counts: the number of images in each part; a part that the folder lacks is missing.
        broken: names of the files that were left out, with the reason.
        fingerprint: SHA-256 of pixels, labels and class names.
        stored_size: height and width of each image, in pixels.
        other_files: those of the `Listing`, which the cache does not depend on.
    """

    path: Path
    class_names: tuple[str, ...]
    channels: int
    counts: dict[str, int]
    broken: dict[str, str]
    fingerprint: str
    stored_size: int
    other_files: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(count, stored_size, stored_size)`` for 1 channel, with a last dimension of 3 for 3."""
        side = (sum(self.counts.values()), self.stored_size, self.stored_size)
        return side if self.channels == 1 else (*side, 3)

    def rows(self, part: str) -> range:
        """The rows of ``images.bin`` that belong to ``part``."""
        before = PARTS[: PARTS.index(part)]
        start = sum(self.counts.get(name, 0) for name in before)
        return range(start, start + self.counts.get(part, 0))

    def labels(self) -> np.ndarray:
        """The labels of all rows, ``(count,)`` int64."""
        return np.load(self.path / "labels.npy", allow_pickle=False)


def list_files(data: FolderData, cache: Cache) -> list[str]:
    """The file of each row of ``images.bin``, relative to ``data.root``.

    Raises:
        UserError: if the folder has changed since it was listed.
    """
    listing = list_images(data)
    if _key(data, listing, cache.path.parent) != cache.path.name:
        raise UserError(f"data.root={printable(data.root)}: has changed since its images were read; try again")
    return [file.name for part in PARTS for file in listing.files.get(part, []) if file.name not in cache.broken]


class MappedImages:
    """Some of the images of a memory-mapped file, read from disk when they are indexed.

    Args:
        images: all images of the file, ``(count, height, width)`` or ``(count, height, width, 3)`` uint8, as a NumPy
            array or a tensor.
        rows: indices ``(n,)`` into ``images``, of the same kind.
    """

    def __init__(self, images: Any, rows: Any):
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.images[self.rows[index]]


def open_cache(data: FolderData) -> Cache:
    """Lists the folder, and decodes its images unless a cache has them.

    Raises:
        UserError: names every fault of the folder and every broken file, or the place that can't be written.
    """
    listing = list_images(data)
    if listing.faults and data.skip_broken:  # otherwise the broken files are found as well, and reported together
        require_usable(listing, listing.broken, data)
    places = {place: _key(data, listing, place) for place in _places(data)}
    for place, key in places.items() if not listing.faults else []:
        if (found := _read(place / key)) is not None:
            return replace(found, other_files=listing.other_files)
    failed = []
    for place, key in places.items():
        is_new = not place.exists()
        try:
            place.mkdir(parents=True, exist_ok=True)
            # Mode "x" writes through no link that was there before: the folder may come from elsewhere.
            with contextlib.suppress(FileExistsError), (place / ".gitignore").open("x") as file:
                file.write("*\n")
            lock = FileLock(place / f".{key}.lock")
            lock.acquire()
        except OSError as error:
            failed.append(f"{place} ({error.strerror})")
            continue
        try:
            # Another process may have written it in the meantime.
            found = None if listing.faults else _read(place / key)
            return replace(found or _write(place / key, data, listing), other_files=listing.other_files)
        except UserError:
            if is_new:
                _remove_unused(place, key)
            raise
        except OSError as error:
            raise MachineError(
                f"{error.filename or place}: the decoded images can't be written ({error.strerror}); free space on the "
                "disk, or set data.cache to another folder"
            ) from error
        finally:
            lock.release()
    raise MachineError(f"data.cache: can't be written: {', '.join(failed)}; set it to a folder that can be written")


def _places(data: FolderData) -> list[Path]:
    """The folders for a cache: ``data.cache``, or beside the root, or if that can't be written, in the home folder."""
    if data.cache:
        for part in PARTS:
            if Path(data.cache).resolve().is_relative_to((Path(data.root) / part).resolve()):
                raise UserError(
                    f"data.cache={printable(data.cache)}: is within {part}/ of data.root; choose a folder outside of it"
                )
        return [Path(data.cache)]
    root = Path(os.path.abspath(data.root))  # noqa: PTH100  # ".." has no name, and a link keeps its own
    places = [root.with_name(f"{root.name}.cache")] if root.name else []  # "/" has none
    with contextlib.suppress(RuntimeError):  # a user without a home folder, as in a container
        places.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nin")
    return places


def _key(data: FolderData, listing: Listing, place: Path) -> str:
    settings = [_FORMAT, PIL.__version__, data.stored_size, data.fit, data.channels, data.skip_broken]
    if data.cache or not place.name.endswith(".cache"):
        # Several folders may share the place. Beside the folder, the cache stays valid when both are moved.
        settings.append(os.path.realpath(data.root))
    digest = hashlib.sha256(json.dumps([settings, listing.class_names, sorted(listing.broken.items())]).encode())
    for part, files in listing.files.items():
        for file in files:
            state = f"{part}\0{file.name}\0{file.label}\0{file.size}\0{file.modified_ns}\n"
            digest.update(state.encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _read(path: Path) -> Cache | None:
    """The cache in ``path`` if it is complete and intact."""
    try:
        if not (path / "about.json").is_file():  # reading a pipe would wait for its writer
            return None
        about = json.loads((path / "about.json").read_text())
        size = (path / "images.bin").stat().st_size
        cache = Cache(path, tuple(about["class_names"]), *(about[name] for name in _STORED))
        labels = cache.labels().tolist()
        if (
            size != int(np.prod(cache.shape))
            or len(labels) != cache.shape[0]
            or _fingerprint(about["sha256"], labels, about["class_names"]) != cache.fingerprint
            or (size <= _HASHED and hash_once(path / "images.bin") != about["sha256"])
        ):
            return None
    except (OSError, EOFError, AttributeError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return cache


def _fingerprint(images_sha256: str, labels: list[int], class_names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([images_sha256, labels, class_names]).encode()).hexdigest()


def _remove_unused(place: Path, key: str) -> None:
    """Removes the place that was made for a folder that is refused, unless another process has begun to use it."""
    own = {".gitignore", f".{key}.lock"}
    with contextlib.suppress(OSError):
        if {path.name for path in place.iterdir()} <= own:
            for name in own:
                (place / name).unlink(missing_ok=True)
            place.rmdir()


def _write(path: Path, data: FolderData, listing: Listing) -> Cache:
    for left_over in path.parent.glob(f".new-{path.name}-*"):  # left by a killed process, whose lock is held here now
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".new-{path.name}-", dir=path.parent) as parent:
        new = Path(parent) / "cache"  # a temporary folder itself is readable by this user alone
        new.mkdir()
        images = new / "images.bin"
        channels, broken = decode_folder(data, listing, images)
        broken = dict(sorted({**listing.broken, **broken}.items()))
        require_unchanged(data, listing)
        require_readable(data, broken)
        require_usable(listing, broken, data)
        rows, labels = [], []
        counts: dict[str, int] = {}
        every = [(part, file) for part in PARTS for file in listing.files.get(part, [])]
        for row, (part, file) in enumerate(every):
            if file.name not in broken:
                rows.append(row)
                labels.append(file.label)
                counts[part] = counts.get(part, 0) + 1
        if len(rows) < len(every):
            _keep_rows(images, rows, data.stored_size**2 * channels)
        np.save(new / "labels.npy", np.array(labels, dtype=np.int64))
        sha256 = hash_file(images)
        fingerprint = _fingerprint(sha256, labels, listing.class_names)
        values = (channels, counts, broken, fingerprint, data.stored_size)
        about: dict[str, Any] = dict(zip(_STORED, values, strict=True))
        about |= {"class_names": listing.class_names, "sha256": sha256, "root": printable(data.root)}
        (new / "about.json").write_text(json.dumps(about))
        shutil.rmtree(path, ignore_errors=True)  # a cache that is incomplete or altered
        new.replace(path)
    return Cache(path, listing.class_names, *(about[name] for name in _STORED))


def require_readable(data: FolderData, broken: dict[str, str]) -> None:
    """Raises UserError, with the files that can't be read for a reason that is not their content."""
    if faults := [f"{printable(name)}: {why}" for name, why in broken.items() if why.startswith(NOT_NOW)]:
        # data.skip_broken must not leave them out: they would stay so as long as the cache is valid.
        files = f"{len(faults)} file{'s' * (len(faults) > 1)}"
        raise folder_error(data.root, faults[:20], f"{files} can't be read now; run the command again when that works")


def require_unchanged(data: FolderData, before: Listing) -> None:
    """Raises UserError if the folder's files are not the same as when it was listed."""
    now = list_images(data)
    old, new = ({file.name: file for files in each.files.values() for file in files} for each in (before, now))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed or now.class_names != before.class_names:
        faults = [f"{printable(name)}: {_change(old.get(name), new.get(name))}" for name in sorted(changed)[:20]]
        raise folder_error(data.root, faults, "changed while it was read; run the command again when it is complete")


def _change(old: ImageFile | None, new: ImageFile | None) -> str:
    return "new" if old is None else "removed" if new is None else "altered"


def _keep_rows(images: Path, rows: Sequence[int], row_bytes: int) -> None:
    """Moves ``rows`` of the file, which are ascending, to its start, and cuts off the others."""
    with images.open("r+b") as file:
        for target, row in enumerate(rows):
            if target != row:
                file.seek(row * row_bytes)
                content = file.read(row_bytes)
                file.seek(target * row_bytes)
                file.write(content)
        file.truncate(len(rows) * row_bytes)
