import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nin.data.decoding import ImageError, ImageTooLargeError, decode, has_color, open_image, to_pixels

RED = (250, 10, 20)


def content_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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
    content = content_of(image)
    assert decode(content, 1).tolist() == [[gray] * 3] * 2
    assert decode(content, 3).tolist() == [[list(rgb)] * 3] * 2


def test_cmyk_and_float_images_are_converted() -> None:
    cmyk = decode(content_of(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF"), 3)
    assert cmyk[0, 0].tolist() == [0, 255, 255]
    floats = Image.fromarray(np.full((2, 2), 0.5, np.float32))
    assert decode(content_of(floats, "TIFF"), 1).tolist() == [[128, 128]] * 2


def test_the_orientation_that_a_camera_noted_is_applied() -> None:
    image = Image.new("L", (2, 3))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    turned = decode(content_of(image, exif=exif), 1)
    assert turned.shape == (2, 3)
    assert turned[0, 2] == 255


def test_an_image_is_brought_to_a_square() -> None:
    image = Image.new("L", (24, 12))
    image.paste(200, (6, 0, 18, 12))  # of 24 columns the twelve in the middle
    crop, stretch, pad = (decode(content_of(image), 1, size=12, fit=fit) for fit in ("crop", "stretch", "pad"))
    assert crop.tolist() == [[200] * 12] * 12
    assert stretch[:, 1].max() == stretch[:, 10].max() == 0
    assert stretch[:, 4:8].min() == 200
    assert pad[:3].max() == pad[9:].max() == pad[:, :2].max() == 0
    assert pad[4:8, 4:8].min() == 200


def test_an_image_of_the_requested_size_is_not_changed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    assert np.array_equal(decode(content_of(Image.fromarray(pixels)), 3, size=9, fit="pad"), pixels)


def test_an_image_of_one_column_can_be_padded() -> None:
    assert decode(content_of(Image.new("L", (1, 900), 9)), 1, size=8, fit="pad")[:, 3:5].max() == 9


def test_only_images_with_color_have_color() -> None:
    def found(image: Image.Image, **options: object) -> bool:
        return has_color(to_pixels(open_image(content_of(image, **options))))

    assert found(Image.new("RGB", (8, 8), RED))
    assert found(Image.new("RGB", (8, 8), RED), kind="JPEG")
    assert not found(Image.new("RGB", (8, 8), (90, 91, 92)))
    assert not found(Image.new("L", (8, 8), 90))


def truncated() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    return content_of(Image.fromarray(noise), "JPEG")[:900]


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
    with pytest.raises(ImageTooLargeError, match="8000x8000 pixels are 64 megapixels; the limit is 50"):
        decode(bomb(8000), 3)
    with pytest.raises(ImageError, match="No such file"):
        decode(tmp_path / "none.png", 3)


def test_no_program_is_started_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads PostScript with Ghostscript, which runs it."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageError, match="not an image in a format that Pillow can read"):
        decode(eps, 1)
    assert not (tmp_path / "started").exists()
