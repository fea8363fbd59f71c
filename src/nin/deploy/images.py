"""The user's own images, decoded as the images of the network's data set are. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from nin.data import idx
from nin.data.decoding import ImageError, find_transparent_level, formats, open_image, to_pixels


@dataclass(frozen=True)
class ImageForm:
    """The form to which image files are decoded, before the network's own preprocessing.

    Attributes:
        channels: 1 (gray) or 3 (color).
        size: pixels per side to which files are brought, as those of `data=folder` were; None keeps their size.
        fit: "crop", "pad" or "stretch".
        invert: whether light and dark are swapped; the padding, and what is transparent, is black all the same.
    """

    channels: int
    size: int | None = None
    fit: str = "stretch"
    invert: bool = False

    def decode(self, content: bytes | Path) -> np.ndarray:
        """``(height, width)`` uint8 for 1 channel, ``(height, width, 3)`` for 3; raises ImageError."""
        return self.read(open_image(content))

    def read(self, image: Image.Image) -> np.ndarray:
        """The pixels of an opened image, as `decode` returns them; closes it.

        Colors become gray by their luminance (ITU-R 601). `to_pixels` describes the rest.
        """
        pixels = to_pixels(image, self.size, self.fit, padding=255 if self.invert else 0)  # black when it is inverted
        mode = "L" if self.channels == 1 else "RGB"
        array = np.array(pixels if pixels.mode == mode else pixels.convert(mode))
        return 255 - array if self.invert else array


@dataclass
class LeftOut:
    """What `iterate` has found and not read.

    Attributes:
        files: in folders, without the suffix of an image.
        folders: of the given ones, those without an image.
    """

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


def iterate(
    paths: list[Path], form: ImageForm, stdin: BinaryIO, left_out: LeftOut
) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    """Yields ``(name, image)`` for each image of files, folders (with all below them), IDX files and ``-``.

    A file that cannot be decoded, or a folder that cannot be read, is yielded with its ImageError in place of the
    image. In folders only files whose suffix is one of Pillow's are read, in the order of their names, also those that
    links lead to, and nothing that is hidden, as with `data=folder`. An image of an IDX file is named ``file[index]``.

    Args:
        left_out: what is not read is added to it.
    """
    for path in paths:
        if str(path) == "-":
            yield from _read("-", stdin.read(), form)
        elif path.is_dir():
            suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in formats()}
            is_empty = True
            for found in _read_folder(path, form, suffixes, left_out):
                is_empty = False
                yield found
            if is_empty:
                left_out.folders.append(str(path))
        else:
            yield from _read_file(path, form)


def _read_folder(
    folder: Path, form: ImageForm, suffixes: set[str], left_out: LeftOut, above: tuple[Path, ...] = ()
) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    try:
        here, entries = folder.resolve(), sorted(folder.iterdir())
    except OSError as error:
        yield str(folder), ImageError(error.strerror or str(error))
        return
    if here in above:
        yield str(folder), ImageError("a link to a folder that contains it")
        return
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _read_folder(path, form, suffixes, left_out, (*above, here))
        elif path.suffix.lower() in suffixes and (path.is_file() or not path.exists()):  # no pipe; a link to nothing
            yield from _read_file(path, form)
        else:
            left_out.files.append(str(path))


def _read_file(path: Path, form: ImageForm) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        yield str(path), ImageError(error.strerror or str(error))
        return
    yield from _read(str(path), content, form)


def _read(name: str, content: bytes, form: ImageForm) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    try:
        if content[:4] == idx.LABELS:
            raise ImageError("an IDX file of labels, not of images")
        if content[:4] == idx.IMAGES:
            images = idx.parse_idx(content)
            if not images.size:
                raise ImageError("an IDX file without pixels")
            for i, image in enumerate(images):
                yield f"{name}[{i}]", _as_array(image, form)
        else:
            yield name, form.decode(content)
    except ImageError as error:
        yield name, error


def as_arrays(images: object, form: ImageForm) -> list[np.ndarray]:
    """Converts images given by Python code to uint8 arrays ``(height, width)`` or ``(height, width, 3)``.

    Args:
        images: one array ``(batch, height, width)`` or ``(batch, height, width, 3)``, or a list of arrays, Pillow
            images and paths. Arrays are uint8; they become what Pillow images of their pixels become.

    Raises:
        ValueError: on another type or shape. ImageError: names a file that cannot be decoded.
    """
    if not isinstance(images, list | tuple | np.ndarray) and not hasattr(images, "__array__"):
        raise ValueError(f"images: a list or an array of images is expected, not {type(images).__name__}")
    shape = tuple(getattr(images, "shape", ()))
    if len(shape) == 3 and shape[-1] == 3:  # read as a batch, they would be gray images of three columns
        raise ValueError(f"images: an array of shape {shape} is one color image; give [image] or image[None]")
    return [_as_array(image, form) for image in images]  # type: ignore[attr-defined]


def _as_array(image: object, form: ImageForm) -> np.ndarray:
    if isinstance(image, str | Path):
        try:
            return form.decode(Path(image))
        except ImageError as error:
            raise type(error)(f"{image}: {error}") from error
    if isinstance(image, Image.Image):
        level = find_transparent_level(image)  # before the pixels are read, which copying does
        copied = image.copy()  # the caller's image stays open and unchanged
        if level:
            copied.info["transparency"] = level
        return form.read(copied)
    array = np.asarray(image)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise ValueError(
            f"images: {array.dtype} of shape {array.shape}; an image is uint8 (height, width) or (height, width, 3)"
        )
    if form.invert or (form.size and array.shape[:2] != (form.size, form.size)):
        return form.read(Image.fromarray(array))
    if form.channels == 1 and array.ndim == 3:
        return np.array(Image.fromarray(array).convert("L"))
    return np.repeat(array[..., None], 3, axis=-1) if form.channels == 3 and array.ndim == 2 else array


def has_light_border(image: np.ndarray) -> bool:
    """Whether most of the outermost pixels are light: dark objects on a light background, the reverse of Fashion-MNIST.

    Args:
        image: ``(height, width)`` or ``(height, width, 3)``, uint8.
    """
    edges = [image[0], image[-1], image[:, 0], image[:, -1]]
    return float(np.median(np.concatenate([edge.reshape(len(edge), -1).mean(-1) for edge in edges]))) > 127


def batches_of_one_size(images: list[np.ndarray], max_images: int, max_pixels: int) -> Iterator[list[int]]:
    """Indices of images that have one shape, at most ``max_images`` and ``max_pixels`` pixels together.

    Args:
        images: each ``(height, width)`` or ``(height, width, 3)``.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        by_shape.setdefault(image.shape, []).append(i)
    for (height, width, *_), indices in by_shape.items():
        step = max(1, min(max_images, max_pixels // (height * width)))
        for start in range(0, len(indices), step):
            yield indices[start : start + step]
