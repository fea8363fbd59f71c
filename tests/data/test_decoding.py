import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from nin.data.decoding import ImageError, ImageTooLargeError, formats, has_color, open_image, to_pixels
from nin.deploy.images import ImageForm, as_arrays
from pictures import encode

RED = (250, 10, 20)
SCAN = b"\xff\xda"


def decode(content: bytes | Path | str, channels: int, **options: Any) -> np.ndarray:
    return ImageForm(channels, **options).read(open_image(content))


@pytest.mark.parametrize(
    ("mode", "color", "gray", "rgb"),
    [
        ("1", 1, 255, (255, 255, 255)),
        ("L", 130, 130, (130, 130, 130)),
        ("LA", (200, 51), 40, (40, 40, 40)),  # a fifth of the gray over black
        ("RGB", RED, 83, RED),
        ("RGBA", (*RED, 255), 83, RED),
        ("RGBA", (*RED, 0), 0, (0, 0, 0)),
        ("I;16", 257 * 77, 77, (77, 77, 77)),
        ("P", 0, 83, RED),
    ],
)
def test_every_mode_becomes_gray_or_color(mode: str, color: object, gray: int, rgb: tuple[int, ...]) -> None:
    image = Image.new(mode, (3, 2), color)
    if mode == "P":
        image.putpalette(list(RED))
    content = encode(image)
    assert decode(content, 1).tolist() == [[gray] * 3] * 2
    assert decode(content, 3).tolist() == [[list(rgb)] * 3] * 2


@pytest.mark.parametrize(
    ("bits", "color", "pixels", "transparent", "dark"),
    [
        (1, 0, "40", "0001", 0),
        (2, 0, "70", "0003", 85),
        (4, 0, "5f", "000f", 85),
        (8, 0, "55ff", "00ff", 85),
        (16, 0, "5555ffff", "ffff", 85),
        (8, 2, "555555121212", "001200120012", 85),
        (16, 2, "555555555555123412341234", "123412341234", 85),
    ],
)
def test_the_level_that_a_png_file_declares_transparent_is_dark(
    bits: int, color: int, pixels: str, transparent: str, dark: int
) -> None:
    """Two pixels, a darker one and the transparent one."""
    header = struct.pack(">IIBBBBB", 2, 1, bits, color, 0, 0, 0)
    content = zlib.compress(b"\0" + bytes.fromhex(pixels))
    chunks = [(b"IHDR", header), (b"tRNS", bytes.fromhex(transparent)), (b"IDAT", content), (b"IEND", b"")]
    file = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    assert decode(file, 1).tolist() == [[dark, 0]]
    assert as_arrays([Image.open(io.BytesIO(file))], ImageForm(1))[0].tolist() == [[dark, 0]]


def test_cmyk_and_float_images_are_converted() -> None:
    cmyk = decode(encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF"), 3)
    assert cmyk[0, 0].tolist() == [0, 255, 255]
    floats = Image.fromarray(np.full((2, 2), 0.5, np.float32))
    assert decode(encode(floats, "TIFF"), 1).tolist() == [[128, 128]] * 2
    infinite = Image.fromarray(np.array([[np.inf, 0.5, np.nan]], np.float32))
    assert decode(encode(infinite, "TIFF"), 1).tolist() == [[0, 128, 0]]


def test_integers_of_32_bits_are_those_of_8_or_of_16_bits() -> None:
    for largest, expected in ((255, [0, 100, 255]), (65535, [0, 0, 255])):
        values = Image.fromarray(np.array([[0, 100, largest]], np.int32))
        assert values.mode == "I"
        assert decode(encode(values, "TIFF"), 1).tolist() == [expected]


def exif_of(orientation: int) -> bytes:
    """The orientation, and a unit of resolution that is a fraction, which Pillow reads but can't write."""
    entries = struct.pack("<H2HII2HII", 2, 0x0112, 3, 1, orientation, 0x0128, 5, 1, 38)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + struct.pack("<3I", 0, 72, 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_orientation_that_a_camera_noted_is_applied(kind: str) -> None:
    image = Image.new("L", (16, 24), 50)
    image.paste(200, (0, 0, 8, 8))  # one of JPEG's blocks, whose gray level it keeps
    stored = np.asarray(image).astype(int)
    upright = [stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1], stored.T]
    upright += [stored.T[:, ::-1], stored.T[::-1, ::-1], stored.T[::-1]]
    for i, expected in enumerate(upright):
        exif: Any = Image.Exif()
        exif[0x0112] = 1 + i
        turned = decode(encode(image, kind, exif=exif if kind == "TIFF" else exif_of(1 + i)), 1)
        assert np.abs(turned.astype(int) - expected).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_with_damaged_metadata_has_its_pixels_as_they_are(kind: str) -> None:
    image = Image.new("L", (16, 24), 50)
    assert decode(encode(image, kind, exif=b"Exif\0\0no metadata"), 1).shape == (24, 16)


def test_a_large_jpeg_file_is_decoded_at_no_less_than_twice_the_requested_size() -> None:
    """Of these stripes, three pixels of the result wide, half that resolution changes 16 gray levels or more."""
    stripes = np.tile(127 + 100 * np.sin(np.arange(400) * 2 * np.pi / 12), (400, 1)).astype(np.uint8)
    content = encode(stripes, "JPEG", quality=95)
    complete = Image.fromarray(decode(content, 1)).resize((100, 100), Image.Resampling.BILINEAR)
    assert np.abs(decode(content, 1, size=100).astype(int) - np.asarray(complete)).max() <= 8


def test_an_image_is_brought_to_a_square() -> None:
    image = Image.new("L", (24, 12))
    image.paste(200, (6, 0, 18, 12))  # of 24 columns the twelve in the middle
    crop, stretch, pad = (decode(encode(image), 1, size=12, fit=fit) for fit in ("crop", "stretch", "pad"))
    assert crop.tolist() == [[200] * 12] * 12
    assert stretch[:, 1].max() == stretch[:, 10].max() == 0
    assert stretch[:, 4:8].min() == 200
    assert pad[:3].max() == pad[9:].max() == pad[:, :2].max() == 0
    assert pad[4:8, 4:8].min() == 200


def test_an_image_of_the_requested_size_is_not_changed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    assert np.array_equal(decode(encode(pixels), 3, size=9, fit="pad"), pixels)


def test_a_padded_image_has_the_size_that_pillow_gives_it() -> None:
    pad = decode(encode(Image.new("L", (400, 150), 9)), 1, size=28, fit="pad")
    assert (pad.max(1) > 0).sum() == ImageOps.contain(Image.new("L", (400, 150)), (28, 28)).height


def test_an_image_of_one_column_can_be_padded() -> None:
    assert decode(encode(Image.new("L", (1, 900), 9)), 1, size=8, fit="pad")[:, 3:5].max() == 9


def test_only_images_with_color_have_color() -> None:
    def found(image: Image.Image, **options: object) -> bool:
        return has_color(to_pixels(open_image(encode(image, **options))))

    assert found(Image.new("RGB", (8, 8), RED))
    assert found(Image.new("RGB", (8, 8), RED), kind="JPEG")
    assert not found(Image.new("RGB", (8, 8), (90, 91, 92)))
    assert not found(Image.new("L", (8, 8), 90))


def truncated() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    return encode(noise, "JPEG")[:900]


def bomb(side: int) -> bytes:
    """A PNG header that declares ``side`` by ``side`` pixels."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk + (0).to_bytes(4, "big") + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", truncated(), bomb(20_000)])
def test_what_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(ImageError):
        decode(content, 3)


def test_the_reason_is_named(tmp_path: Path) -> None:
    for content, reason in ((b"text", "not an image"), (truncated(), "damaged .image file is truncated")):
        with pytest.raises(ImageError, match=reason):
            decode(content, 3)
    (tmp_path / "empty.png").touch()
    for nothing in (b"", tmp_path / "empty.png", str(tmp_path / "empty.png")):
        with pytest.raises(ImageError, match=r"^has no bytes$"):  # as `list_images` names it
            decode(nothing, 3)
    with pytest.raises(ImageTooLargeError, match="8000x8000 pixels are 64 megapixels; the limit is 50"):
        decode(bomb(8000), 3)
    for limit, message in ((63_999_999, "are 64 megapixels; the limit is 63.999999"), (500_000, "the limit is 0.5")):
        with pytest.raises(ImageTooLargeError, match=f"{message}$"):
            open_image(bomb(8000), limit)
    with pytest.raises(ImageError, match="No such file"):
        decode(tmp_path / "none.png", 3)


def with_scans(count: int, **options: object) -> bytes:
    """A JPEG file whose last scan is repeated until there are ``count``."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    content = encode(noise, "JPEG", **options)
    last = content[content.rindex(SCAN) : -2]
    return content[:-2] + last * (count - content.count(SCAN)) + content[-2:]


def test_a_jpeg_file_of_more_scans_than_programs_write_is_refused(tmp_path: Path) -> None:
    for count in (10, 100):
        assert decode(with_scans(count, progressive=True), 3).shape == (16, 16, 3)
    # One after another for each color, without progression.
    header, _, _ = with_scans(1, subsampling=0).partition(SCAN)
    by_color = b"".join(SCAN + bytes([0, 8, 1, color, 0, 0, 63, 0]) + bytes(200) for color in (1, 2, 3))
    assert decode(header + by_color + b"\xff\xd9", 3).shape == (16, 16, 3)
    for content in (with_scans(101, progressive=True), header + by_color * 34 + b"\xff\xd9"):
        (tmp_path / "file.jpg").write_bytes(content)
        for source in (content, tmp_path / "file.jpg", str(tmp_path / "file.jpg")):
            with pytest.raises(ImageError, match="a JPEG file of 16x16 pixels and more than 100 scans"):
                decode(source, 3)


@pytest.mark.parametrize(("side", "most"), [(2500, 100), (3000, 69), (5000, 25), (7000, 25)])
def test_a_large_jpeg_file_may_have_fewer_scans(side: int, most: int) -> None:
    """Only the header is read, so it may declare another size than the scans have."""
    for count in (most, most + 1):
        content = with_scans(count, progressive=True)
        place = content.index(b"\xff\xc2") + 5  # after marker, length and precision
        content = content[:place] + side.to_bytes(2) * 2 + content[place + 4 :]
        if count == most:
            assert open_image(content).size == (side, side)
        else:
            with pytest.raises(ImageError, match=f"{side}x{side} pixels and more than {most} scans"):
                open_image(content)


def test_scans_of_a_thumbnail_and_of_what_follows_a_jpeg_file_are_not_counted() -> None:
    content = with_scans(10, progressive=True)
    thumbnail = b"\xff\xe5" + (20_002).to_bytes(2) + SCAN * 10_000
    assert np.array_equal(decode(content[:2] + thumbnail + content[2:] + SCAN * 10_000, 3), decode(content, 3))


@pytest.mark.parametrize("kind", ["ICO", "ICNS"])
def test_a_file_inside_a_file_of_another_format_is_not_decoded(kind: str) -> None:
    with pytest.raises(ImageError, match="not an image in a format that Pillow can read"):
        open_image(encode(Image.new("L", (32, 32)), kind))


def test_no_program_is_started_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads PostScript with Ghostscript, which runs it; also inside an IPTC file."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    fields = [(3, 60, b"\1\0"), (3, 20, b"\0\t"), (3, 30, b"\0\t"), (3, 120, b"\5"), (8, 10, eps)]
    iptc = b"".join(b"\x1c" + bytes(kind) + len(value).to_bytes(2) + value for *kind, value in fields)
    for content in (eps, iptc):
        with pytest.raises(ImageError, match="not an image in a format that Pillow can read"):
            decode(content, 1)
    assert not (tmp_path / "started").exists()


def tiff_with_tiles(side: int, tile: int) -> bytes:
    """The header of a TIFF file of one gray image in deflated tiles, and no pixels."""
    entries = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 200, 325: 20}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    header = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    return (header + rows + bytes(4)).ljust(200, b"\0") + bytes(range(20))


def test_a_small_tiff_file_of_large_tiles_is_refused() -> None:
    with pytest.raises(ImageError, match=r"^a TIFF file of 100x100 pixels with tiles of 46336x46336$"):
        open_image(tiff_with_tiles(100, 46336))
    assert open_image(tiff_with_tiles(100, 1024)).size == (100, 100)


def test_formats_that_are_slow_or_never_decoded_are_no_images() -> None:
    assert not {"QOI", "FITS", "MPEG", "EPS"} & {*formats()}
    assert {"PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"} <= {*formats()}


def test_a_photo_that_can_not_be_turned_for_lack_of_memory_is_not_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(ImageTooLargeError, match="does not fit in memory"):
        to_pixels(Image.new("L", (2, 3)))
