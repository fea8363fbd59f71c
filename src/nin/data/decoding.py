"""Decodes image files with Pillow to uint8 arrays: the images of a folder, and images to predict.

Imports NumPy and Pillow only, since each process that decodes imports this module.
"""

import functools
import io
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

# A photo of 50 megapixels is 150 MB as pixels and 600 MB as float32.
MAX_PIXELS = 50_000_000
# The largest tile of a TIFF file whose image is smaller: libtiff allocates and clears a whole tile, however few bytes
# the file has.
MAX_TILE_PIXELS = 1024 * 1024
# Each scan of a JPEG file passes over all pixels, however few bytes it has. Progressive files have 6 to 18; libtiff and
# others have the first limit too. 625 megapixels are 25 scans of the largest image that `nin serve` takes by default;
# as many are allowed for any size.
MAX_SCANS, ALWAYS_ALLOWED_SCANS, MAX_SCANNED_PIXELS = 100, 25, 625_000_000
# Markers of a JPEG file, without the bytes 255 and the restarts inside a scan.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_FRAMES, _START, _END, _SCAN = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}, 0xD8, 0xD9, 0xDA


class ImageError(ValueError):
    """The content is not an image that can be decoded; the message gives the reason."""


class ImageTooLargeError(ImageError):
    """The image has more pixels than allowed; raised before they are decoded."""


def silence_pillow() -> None:
    """Hides warnings about damaged metadata, and about many pixels, for which `MAX_PIXELS` is the limit."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(content: bytes | Path | str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads the header of an image; `to_pixels` reads its pixels.

    Raises:
        ImageTooLargeError: if it has more than ``max_pixels`` pixels.
        ImageError: if it is not an image, has no pixels, or is a JPEG file of more scans than `most_scans` allows.
    """
    try:
        image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=formats())
        too_many_scans = image.format in ("JPEG", "MPO") and _has_too_many_scans(image)
    except Exception as error:
        raise ImageError("has no bytes") if _is_empty(content) else _name_error(error) from error
    width, height = image.size
    tile_width, tile_height = (_tag(image, tag) for tag in (322, 323))
    refused: ImageError | None = None
    if width * height > max_pixels:
        megapixels = f"{width}x{height} pixels are {width * height / 1e6:.8g} megapixels"
        refused = ImageTooLargeError(f"{megapixels}; the limit is {max_pixels / 1e6:.8g}")
    elif not width * height:
        refused = ImageError("has no pixels")
    elif tile_width * tile_height > max(width * height, MAX_TILE_PIXELS):
        refused = ImageError(f"a TIFF file of {width}x{height} pixels with tiles of {tile_width}x{tile_height}")
    elif too_many_scans:
        refused = ImageError(f"a JPEG file of {width}x{height} pixels and more than {most_scans(image)} scans")
    if refused:
        image.close()
        raise refused
    return image


def _tag(image: Image.Image, tag: int) -> int:
    """An integer in a TIFF file's header; 0 if there is none. JPEG files may have such tags too."""
    value = getattr(image, "tag_v2", {}).get(tag, 0) if image.format == "TIFF" else 0
    return value if isinstance(value, int) else 0


def _is_empty(content: bytes | Path | str) -> bool:
    if isinstance(content, str | Path):
        path = Path(content)
        return path.is_file() and not path.stat().st_size
    return content == b""


def _has_too_many_scans(image: ImageFile.ImageFile) -> bool:
    assert image.fp is not None
    image.fp.seek(0)
    content, most = image.fp.read(), most_scans(image)
    if len(content) < 10_000 and content.count(b"\xff\xda") <= most:
        return False  # takes less time than reading the segments
    scans, place, components, progressive = 0, 0, 0, False
    # Segments are skipped, as are thumbnails in them; what follows the end of the image, such as a video, is not read.
    while scans <= most and (found := _MARKER.search(content, place)) and (marker := found[1][0]) != _END:
        place = found.end()
        if marker in _FRAMES:
            components, progressive = content[place + 7], marker & 3 == 2
        elif marker == _SCAN:
            if content[place + 2] == components and not progressive:
                return False  # the usual file: libjpeg reads no second scan
            scans += 1
        if marker >= 0xC0 and marker != _START:  # markers below this have no segment
            place += int.from_bytes(content[place : place + 2])
    return scans > most


def most_scans(image: Image.Image) -> int:
    """How many scans a JPEG file of this size may have: 100 up to 6.25 megapixels, 25 from 25 megapixels on."""
    return max(ALWAYS_ALLOWED_SCANS, min(MAX_SCANS, MAX_SCANNED_PIXELS // max(1, image.width * image.height)))


@functools.cache
def formats() -> list[str]:
    """Pillow's formats, without those that can evade the limits.

    For PostScript Pillow starts Ghostscript, and a file must not be a program. ICO, ICNS, BLP and IPTC files hold a
    file of another format, whose size Pillow reads only when it decodes it (of ICO files already when they are opened),
    and which in IPTC files may be PostScript. Of MPEG, HDF5, GRIB and BUFR files Pillow knows the names only. QOI
    and FITS files take up to a second for each megapixel.
    """
    Image.preinit()  # the common ones are tried first
    Image.init()
    excluded = ("EPS", "ICO", "ICNS", "BLP", "IPTC", "MPEG", "HDF5", "GRIB", "BUFR", "QOI", "FITS")
    return [name for name in Image.ID if name not in excluded]


def to_pixels(image: Image.Image, size: int | None = None, fit: str = "crop", padding: int = 0) -> Image.Image:
    """The pixels of an opened image, in mode "L" if its own mode has no color, otherwise "RGB"; closes it.

    The EXIF orientation is applied, transparency is composited over ``padding``, 16 bits are scaled to 8. Of several
    frames the first is decoded.

    Args:
        size: height and width of the result in pixels; None keeps those of the image.
        fit: how the image is brought to ``size``: "crop" (the centered square), "pad" or "stretch".
        padding: the gray level around a padded image, and behind what is transparent.

    Raises:
        ImageTooLargeError: if it does not fit in memory.
        ImageError: if it is damaged.
    """
    try:
        with image:
            if size and min(image.size) >= 4 * size:
                # Decodes a JPEG file at 1/2, 1/4 or 1/8 of its size, several times faster, where that is at least twice
                # the requested one.
                image.draft(None, (2 * size, 2 * size))
            if level := find_transparent_level(image):
                image.info["transparency"] = level
            # A JPEG file has its orientation in one of these, if any; looking for it takes a tenth of the time.
            if image.format != "JPEG" or "exif" in image.info or "xmp" in image.info:
                _turn_upright(image)
            image = _to_gray_or_rgb(image, padding)
            return _fit(image, size, fit, padding) if size else image
    except Exception as error:
        raise _name_error(error) from error


def find_transparent_level(image: Image.Image) -> int | tuple[int, ...] | None:
    """The level that a PNG file declares transparent, in 8 bits, where Pillow scales the pixels but not this level.

    None for other images, and if the pixels have been read: the number of bits is then unknown.
    """
    tiles = getattr(image, "tile", None) if image.format == "PNG" else None
    match image.info.get("transparency"), tiles[0].args if tiles else None:
        case int(level), "L;2" | "L;4" as mode:
            return level * (85 if mode == "L;2" else 17)
        case (red, green, blue), "RGB;16B":
            return (red >> 8, green >> 8, blue >> 8)
    return None


def _turn_upright(image: Image.Image) -> None:
    """Applies the EXIF orientation."""
    image.load()  # of a TIFF file, Pillow applies it here
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:  # a cache must not keep an image that is not turned
        raise
    except Exception:  # noqa: BLE001  # damaged metadata; the pixels are intact, and turned before it is written
        pass


def has_color(image: Image.Image) -> bool:
    """Whether the channels of an image in mode "L" or "RGB" differ by more than the rounding of its compression."""
    if image.mode == "L":
        return False
    pixels = np.asarray(image)
    return int((pixels.max(-1) - pixels.min(-1)).max()) > 16


def _name_error(error: Exception) -> ImageError:
    """The reason for anything that Pillow raises: SyntaxError, struct.error, KeyError, … on a damaged file."""
    match error:
        case UnidentifiedImageError():
            return ImageError("not an image in a format that Pillow can read")
        case Image.DecompressionBombError():
            return ImageTooLargeError(str(error).partition(",")[0])
        case OSError():
            return ImageError(error.strerror or f"damaged ({error})")
        case MemoryError():
            return ImageTooLargeError("does not fit in memory")
    return ImageError(f"damaged ({type(error).__name__}: {error})")


def _to_gray_or_rgb(image: Image.Image, ground: int) -> Image.Image:
    """Converts any of Pillow's modes to "L" or "RGB"; what is transparent gets the gray level ``ground``."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit PNG and TIFF files; 65535 becomes 255. Of 32 bits, programs use as many as 16 bits or 8 bits have.
        values = np.asarray(image).astype(np.float64)
        scale = 257 if image.mode != "I" or values.max(initial=0) > 255 else 1
        levels = (values / scale).round().clip(0, 255).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):  # the value that a PNG declares transparent
            levels[values == transparent] = ground
        image = Image.fromarray(levels)
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        scale = 255 if values.max(initial=0) <= 1 else 1  # floats are from 0 to 1 or from 0 to 255
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (ground, ground, ground, 255)), image).convert(
            "RGB"
        )
    image.load()
    return image if image.mode == mode else image.convert(mode)


def _fit(image: Image.Image, size: int, fit: str, padding: int) -> Image.Image:
    """Brings an image to ``size`` by ``size`` pixels: bilinear, with antialiasing when it is reduced."""
    if image.size == (size, size):
        return image
    if fit == "stretch":
        return image.resize((size, size), Image.Resampling.BILINEAR)
    if fit == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    # As ImageOps.contain rounds, which fails where a side would have no pixel.
    width, height = (max(1, round(side / max(image.size) * size)) for side in image.size)
    padded = Image.new(image.mode, (size, size), (padding,) * len(image.getbands()))
    inner = image.resize((width, height), Image.Resampling.BILINEAR)
    padded.paste(inner, ((size - width) // 2, (size - height) // 2))
    return padded
