"""What a user hands over as images: files, folders, IDX files, arrays."""

import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nin.data.decoding import ImageError
from nin.deploy import images
from nin.deploy.images import ImageForm, LeftOut
from pictures import encode


def test_folders_files_idx_and_standard_input_are_read_in_order(tmp_path: Path) -> None:
    gray = Image.new("L", (2, 2), 7)
    tmp_path /= ".given"  # the user names it, hidden or not
    for folder in ("below", "below/.thumbnails"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("b.png", "below/a.webp", ".hidden.png", "below/.thumbnails/c.png"):
        gray.save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "clip.mpg").write_bytes(bytes(9))  # Pillow knows the name only
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    idx = tmp_path / "images-idx3-ubyte"
    idx.write_bytes(struct.pack(">4I", 0x0803, 2, 1, 3) + bytes(range(6)))
    (tmp_path / "none").mkdir()
    left_out = LeftOut()
    given = [tmp_path, idx, tmp_path / "none", Path("-")]
    found = list(images.iterate(given, ImageForm(1), io.BytesIO(encode(gray)), left_out))
    unread = [str(tmp_path / name) for name in ("clip.mpg", "images-idx3-ubyte", "notes.txt")]
    assert left_out == LeftOut(unread, [str(tmp_path / "none")])
    names = [name.removeprefix(f"{tmp_path}/") for name, _ in found]
    assert names == ["b.png", "below/a.webp", "broken.jpg", "images-idx3-ubyte[0]", "images-idx3-ubyte[1]", "-"]
    assert isinstance(found[2][1], ImageError)
    assert found[4][1].tolist() == [[3, 4, 5]]
    assert found[5][1].tolist() == [[7, 7], [7, 7]]


def test_linked_folders_are_read_and_what_can_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "ants").mkdir(parents=True)
    Image.new("L", (2, 2), 7).save(tmp_path / "elsewhere" / "ants" / "1.png")
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, target in (("a", "../elsewhere/ants"), ("b", "."), ("c.png", "gone.png"), ("d.png", "a/1.png")):
        (photos / name).symlink_to(target)
    os.mkfifo(photos / "e.png")
    found = {
        name.removeprefix(f"{photos}/"): image
        for name, image in images.iterate([photos], ImageForm(1), io.BytesIO(), LeftOut())
    }
    assert list(found) == ["a/1.png", "b", "c.png", "d.png"]
    assert found["a/1.png"].tolist() == found["d.png"].tolist() == [[7, 7], [7, 7]]
    assert (str(found["b"]), str(found["c.png"])) == (
        "a link to a folder that contains it",
        "No such file or directory",
    )


def test_a_folder_that_can_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    ((name, error),) = images.iterate([tmp_path], ImageForm(1), io.BytesIO(), LeftOut())
    assert (name, str(error)) == (str(tmp_path), "Permission denied")


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
    color = np.zeros((4, 5, 3), np.uint8)
    assert [a.shape for a in images.as_arrays([color, Image.new("RGBA", (5, 4))], ImageForm(1))] == [(4, 5), (4, 5)]
    assert [a.shape for a in images.as_arrays(np.zeros((2, 4, 5), np.uint8), ImageForm(3))] == [(4, 5, 3), (4, 5, 3)]
    for wrong in (np.zeros((2, 4, 5)), np.zeros((28,), np.uint8), "a.png", [np.zeros((4, 4, 2), np.uint8)]):
        with pytest.raises(ValueError, match="images: "):
            images.as_arrays(wrong, ImageForm(1))
    with pytest.raises(ValueError, match=r"shape \(4, 5, 3\) is one color image; give \[image\] or image\[None\]"):
        images.as_arrays(np.zeros((4, 5, 3), np.uint8), ImageForm(3))


def test_a_file_that_python_code_gives_and_that_can_not_be_decoded_is_named(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "shirt.png")
    for name, reason in (("gone.png", "No such file or directory"), (".", "Is a directory")):
        wrong = tmp_path / name
        with pytest.raises(ImageError, match=rf"^{re.escape(str(wrong))}: {reason}$"):
            images.as_arrays([str(tmp_path / "shirt.png"), wrong], ImageForm(1))


def test_files_for_a_network_of_a_folder_are_brought_to_its_size_as_its_images_were() -> None:
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 0, 0), (0, 0, 6, 20))  # the crop leaves it out
    cropped = images.as_arrays([picture], ImageForm(3, 10, "crop"))[0]
    assert cropped.shape == (10, 10, 3)
    assert cropped[..., 0].min() == 255
    assert images.as_arrays([picture], ImageForm(3, 10, "stretch"))[0][:, 0, 0].max() == 0
    assert images.as_arrays([picture], ImageForm(1))[0].shape == (20, 40)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_and_idx_files_become_what_pillow_images_and_files_become(
    fit: str, channels: int, tmp_path: Path
) -> None:
    form, random = ImageForm(channels, 28, fit), np.random.default_rng(0)
    shapes = ((28, 84), (28, 28), (9, 7), (200, 150))
    for shape in shapes + tuple((*shape, 3) for shape in shapes):
        array = random.integers(0, 256, shape, np.uint8)
        picture = Image.fromarray(array)
        expected = images.as_arrays([picture], form)[0]
        assert expected.shape[:2] == (28, 28)
        assert np.array_equal(form.decode(encode(picture)), expected)
        assert np.array_equal(images.as_arrays(array[None], form)[0], expected)
        assert np.array_equal(images.as_arrays([expected], form)[0], expected)
        if array.ndim == 2:
            (tmp_path / "idx").write_bytes(struct.pack(">4I", 0x0803, 1, *array.shape) + array.tobytes())
            assert np.array_equal(next(images.iterate([tmp_path / "idx"], form, io.BytesIO(), LeftOut()))[1], expected)


def test_arrays_for_a_network_of_another_data_set_keep_their_pixels() -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (2, 28, 84), np.uint8)
    assert np.array_equal(images.as_arrays(arrays, ImageForm(1)), arrays)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_light_and_dark_are_swapped_before_an_image_is_padded(channels: int, mode: str) -> None:
    picture = Image.new(mode, (84, 28), "white")
    inverted = ImageForm(channels, 28, "pad", invert=True)
    assert [image.max() for image in images.as_arrays([picture, np.asarray(picture)], inverted)] == [0, 0]
    for size, fit in ((28, "crop"), (28, "stretch"), (None, "stretch")):
        gray = Image.new(mode, (84, 28), (200,) * len(mode))
        assert set(ImageForm(channels, size, fit, invert=True).decode(encode(gray)).flat) == {55}
    dark_on_transparent = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    dark_on_transparent.paste((20, 20, 20, 255), (0, 0, 14, 28))
    assert set(inverted.decode(encode(dark_on_transparent)).flat) == {0, 235}
