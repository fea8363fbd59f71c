"""Decoding: every mode and fault of a picture file that a user may hand over."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nin.deploy import images
from nin.deploy.images import ImageError, ImageTooLargeError, decode


def encoded(image: Image.Image, form: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_a_grey_png_is_decoded_bit_for_bit() -> None:
    values = np.random.default_rng(0).integers(0, 256, (28, 30), dtype=np.uint8)
    assert np.array_equal(decode(encoded(Image.fromarray(values)), 1), values)
    colour = decode(encoded(Image.fromarray(values)), 3)
    assert colour.shape == (28, 30, 3)
    assert np.array_equal(colour[..., 2], values)


def test_sixteen_bits_become_eight() -> None:
    values = np.array([[0, 257, 65535, 32896]], np.uint16)
    assert decode(encoded(Image.fromarray(values)), 1).tolist() == [[0, 1, 255, 128]]
    assert decode(encoded(Image.fromarray(values), "tiff"), 1).tolist() == [[0, 1, 255, 128]]


def test_floats_from_0_to_1_or_to_255() -> None:
    assert decode(encoded(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "tiff"), 1).tolist() == [[0, 128, 255]]
    assert decode(encoded(Image.fromarray(np.array([[0, 7, 300]], np.float32)), "tiff"), 1).tolist() == [[0, 7, 255]]


def test_transparency_is_composited_over_black() -> None:
    half = Image.new("LA", (2, 1), (200, 128))
    assert decode(encoded(half), 1)[0, 0] == 100
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([9, 9, 9, 250, 250, 250])
    assert decode(encoded(palette), 1).tolist() == [[250, 250]]
    assert decode(encoded(palette, transparency=1), 1).tolist() == [[0, 0]]


def test_colours_become_grey_by_their_luminance_and_cmyk_is_read() -> None:
    assert decode(encoded(Image.new("RGB", (1, 1), (255, 0, 0))), 1).tolist() == [[76]]
    assert decode(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "jpeg"), 1).max() <= 1
    assert decode(encoded(Image.new("1", (1, 1), 1)), 1).tolist() == [[255]]


def test_the_rotation_of_a_camera_is_applied() -> None:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    assert decode(encoded(image, exif=exif), 1).tolist() == [[3, 0], [4, 1], [5, 2]]


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("L", (4, 4), shade) for shade in (50, 200)]
    assert decode(encoded(frames[0], "gif", save_all=True, append_images=frames[1:]), 1).tolist() == [[50] * 4] * 4


def test_what_is_no_image_or_damaged_is_named() -> None:
    good = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)))
    for bad in (b"", b"<html>", good[:40], good[:-800], b"\x00" * 100, b"GIF89a"):
        with pytest.raises(ImageError):
            decode(bad, 1)


@pytest.mark.parametrize(
    ("side", "message"),
    [(20_000, "400000000 pixels"), (8_000, "8000x8000 pixels are 64 megapixels; the limit is 50")],
)
def test_an_image_of_many_pixels_is_refused_before_it_is_decoded(side: int, message: str) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(ImageTooLargeError, match=message):
        decode(b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x00IDAT", 1)


def test_folders_files_idx_and_standard_input_are_read_in_order(tmp_path: Path) -> None:
    grey = Image.new("L", (2, 2), 7)
    (tmp_path / "below").mkdir()
    for name in ("b.png", "below/a.webp", ".hidden.png"):
        grey.save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    idx = tmp_path / "images-idx3-ubyte"
    idx.write_bytes(struct.pack(">4I", 0x0803, 2, 1, 3) + bytes(range(6)))
    found = list(images.iterate([tmp_path, idx, Path("-")], 1, io.BytesIO(encoded(grey))))
    names = [name.removeprefix(f"{tmp_path}/") for name, _ in found]
    assert names == ["b.png", "below/a.webp", "broken.jpg", "images-idx3-ubyte[0]", "images-idx3-ubyte[1]", "-"]
    assert isinstance(found[2][1], ImageError)
    assert found[4][1].tolist() == [[3, 4, 5]]
    assert found[5][1].tolist() == [[7, 7], [7, 7]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack(">4I", 0x0803, 2, 1, 3) + bytes(5), r"declares 6 values of \(2, 1, 3\), the file holds 5"),
        (struct.pack(">2I", 0x0803, 2), "not an IDX file"),
        (b"\x00\x00\x0d\x03" + bytes(40), "not an IDX file"),
    ],
)
def test_a_damaged_idx_file_is_named(content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        images.parse_idx(content)


def test_a_light_border_is_noticed() -> None:
    shirt = np.zeros((28, 28), np.uint8)
    shirt[4:24, 6:22] = 220
    assert not images.has_light_border(shirt)
    assert images.has_light_border(255 - shirt)
    assert images.has_light_border(np.repeat((255 - shirt)[..., None], 3, axis=-1))


def test_batches_have_one_size_and_a_limit() -> None:
    shapes = [(2, 2), (3, 2), (2, 2), (2, 2), (100, 100)]
    found = list(images.batches_of_one_size([np.zeros(shape, np.uint8) for shape in shapes], 2, 50))
    assert found == [[0, 2], [3], [1], [4]]


def test_arrays_and_pictures_of_python_code_become_what_the_network_needs() -> None:
    colour = np.zeros((4, 5, 3), np.uint8)
    assert [a.shape for a in images.as_arrays([colour, Image.new("RGBA", (5, 4))], 1)] == [(4, 5), (4, 5)]
    assert [a.shape for a in images.as_arrays(np.zeros((2, 4, 5), np.uint8), 3)] == [(4, 5, 3), (4, 5, 3)]
    for wrong in (np.zeros((2, 4, 5)), np.zeros((28,), np.uint8), "a.png", [np.zeros((4, 4, 2), np.uint8)]):
        with pytest.raises(ValueError, match="images: "):
            images.as_arrays(wrong, 1)
