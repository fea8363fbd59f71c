"""The user's own images: decoded by Pillow to uint8 arrays, as the images of a data set are. Imports no torch."""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# A photo of 50 megapixels is 150 MB as pixels and 600 MB as float32; larger ones are no camera's.
MAX_PIXELS = 50_000_000
_IDX_IMAGES, _IDX_LABELS = b"\x00\x00\x08\x03", b"\x00\x00\x08\x01"  # unsigned bytes in three dimensions, in one

# Of damaged metadata and of many pixels, for which there is a limit of our own.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """What was given is no image that can be decoded: the message says why."""


class ImageTooLargeError(ImageError):
    """The image has more pixels than allowed; it is refused before they are decoded."""


def decode(content: bytes | BinaryIO | Path, channels: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes one image to ``(height, width)`` uint8 for 1 channel, or ``(height, width, 3)`` for 3.

    The rotation that a camera noted (EXIF) is applied, transparency is composited over black, 16 bits are scaled
    to 8, colours become grey by their luminance (ITU-R 601). Of several frames the first counts.

    Raises:
        ImageTooLargeError: if it has more than ``max_pixels`` pixels.
        ImageError: if it is not an image, or is damaged.
    """
    return to_array(open_image(content, max_pixels), channels)


def open_image(content: bytes | BinaryIO | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image's header alone; `to_array` reads its pixels. Raises as `decode` does."""
    with _errors_named():
        image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
        width, height = image.size
        if width * height > max_pixels:
            megapixels = f"{width}x{height} pixels are {width * height / 1e6:.0f} megapixels"
            raise ImageTooLargeError(f"{megapixels}; the limit is {max_pixels / 1e6:.0f}")
        if not width * height:
            raise ImageError("has no pixels")
        return image


def to_array(image: Image.Image, channels: int) -> np.ndarray:
    """An opened image's pixels, as `decode` returns them; closes it."""
    with _errors_named(), image:
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(_flatten(image, "L" if channels == 1 else "RGB"))


@contextlib.contextmanager
def _errors_named() -> Iterator[None]:
    """Whatever Pillow raises becomes an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image in a format that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(str(error)) from None
    except OSError as error:
        raise ImageError(error.strerror or f"damaged ({error})") from error
    except MemoryError:
        raise ImageTooLargeError("does not fit in memory") from None
    # Pillow's decoders raise whatever they come across in a damaged file: SyntaxError, struct.error, KeyError, …
    except Exception as error:
        raise ImageError(f"damaged ({type(error).__name__}: {error})") from error


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """Any of Pillow's modes to "L" or "RGB"."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit PNG and TIFF files; 65535 becomes 255.
        values = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        scale = 255 if values.max(initial=0) <= 1 else 1  # floats are from 0 to 1 or from 0 to 255
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def iterate(paths: list[Path], channels: int, stdin: BinaryIO) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    """Yields ``(name, image)`` for each image of files, folders (with all below them), IDX files and ``-``.

    A file that cannot be decoded is yielded with its ImageError in place of the image. In folders only files whose
    suffix is one of Pillow's are read, in the order of their names. An image of an IDX file is named ``file[index]``.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for path in paths:
        if str(path) == "-":
            yield from _read("-", stdin.read(), channels)
        elif path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.suffix.lower() in suffixes and file.is_file() and not file.name.startswith("."):
                    yield from _read_file(file, channels)
        else:
            yield from _read_file(path, channels)


def _read_file(path: Path, channels: int) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        yield str(path), ImageError(error.strerror or str(error))
        return
    yield from _read(str(path), content, channels)


def _read(name: str, content: bytes, channels: int) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    try:
        if content[:4] == _IDX_LABELS:
            raise ImageError("an IDX file of labels, not of images")
        if content[:4] == _IDX_IMAGES:
            for i, image in enumerate(parse_idx(content)):
                yield f"{name}[{i}]", _as_array(image, channels)
        else:
            yield name, decode(content, channels)
    except ImageError as error:
        yield name, error


def parse_idx(content: bytes) -> np.ndarray:
    """The values of an IDX file: ``(count, height, width)`` images or ``(count,)`` labels, uint8.

    Raises:
        ImageError: if the content is neither, cut off or too long.
    """
    if content[:4] not in (_IDX_IMAGES, _IDX_LABELS) or len(content) < 4 + 4 * content[3]:
        raise ImageError("not an IDX file of images or labels")
    shape = tuple(int(n) for n in np.frombuffer(content, dtype=">u4", offset=4, count=content[3]))
    start = 4 + 4 * len(shape)
    if (values := math.prod(shape)) != len(content) - start:
        raise ImageError(f"the header declares {values} values of {shape}, the file holds {len(content) - start}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def as_arrays(images: object, channels: int) -> list[np.ndarray]:
    """What Python code hands over, as a list of uint8 arrays ``(height, width)`` or ``(height, width, 3)``.

    Args:
        images: one array ``(batch, height, width)`` or ``(batch, height, width, 3)``, or a list of arrays, Pillow
            images and paths. Arrays are uint8; grey and colour ones are converted as the network needs them.

    Raises:
        ValueError: on another type or shape. ImageError: if a file cannot be decoded.
    """
    if not isinstance(images, list | tuple | np.ndarray) and not hasattr(images, "__array__"):
        raise ValueError(f"images: a list or an array of images is expected, not {type(images).__name__}")
    return [_as_array(image, channels) for image in images]  # type: ignore[attr-defined]


def _as_array(image: object, channels: int) -> np.ndarray:
    if isinstance(image, str | Path):
        return decode(Path(image), channels)
    if isinstance(image, Image.Image):
        return np.array(_flatten(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise ValueError(
            f"images: {array.dtype} of shape {array.shape}; an image is uint8 (height, width) or (height, width, 3)"
        )
    if channels == 1 and array.ndim == 3:
        return np.array(Image.fromarray(array).convert("L"))
    return np.repeat(array[..., None], 3, axis=-1) if channels == 3 and array.ndim == 2 else array


def has_light_border(image: np.ndarray) -> bool:
    """Whether most of the outermost pixels are light: it is dark on light, the reverse of Fashion-MNIST."""
    edges = [image[0], image[-1], image[:, 0], image[:, -1]]
    return float(np.median(np.concatenate([edge.reshape(len(edge), -1).mean(-1) for edge in edges]))) > 127


def batches_of_one_size(images: list[np.ndarray], max_images: int, max_pixels: int) -> Iterator[list[int]]:
    """Indices of images that have one shape, at most ``max_images`` and ``max_pixels`` pixels together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        by_shape.setdefault(image.shape, []).append(i)
    for (height, width, *_), indices in by_shape.items():
        step = max(1, min(max_images, max_pixels // (height * width)))
        for start in range(0, len(indices), step):
            yield indices[start : start + step]
