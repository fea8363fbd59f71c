import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nin.config.schema import UserError
from nin.data import cache as cache_module
from nin.data import parallel
from nin.data.cache import Cache, _places, open_cache
from nin.data.decoding import open_image, to_pixels
from pictures import folder_data, write_folder


def pixels(cache: Cache) -> np.ndarray:
    return np.fromfile(cache.path / "images.bin", dtype=np.uint8).reshape(cache.shape)


@contextmanager
def nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "decode_chunk", lambda *_: pytest.fail("decoded again"))
        yield


def test_the_cache_has_the_images_as_they_are_decoded(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 2, "test": 1}, size=20)
    cache = open_cache(folder_data(root))
    assert (cache.shape, cache.channels, cache.counts) == ((9, 12, 12, 3), 3, {"train": 6, "test": 3})
    assert cache.class_names == ("blue", "green", "red")
    assert cache.labels().tolist() == [0, 0, 1, 1, 2, 2, 0, 1, 2]
    assert list(cache.rows("test")) == [6, 7, 8]
    for row, name in ((0, "train/blue/0.png"), (3, "train/green/1.png"), (8, "test/red/0.png")):
        assert np.array_equal(pixels(cache)[row], to_pixels(open_image(root / name), size=12))
    assert cache.path.parent == tmp_path / "root.cache"
    assert (cache.path.parent / ".gitignore").read_text() == "*\n"


def test_a_second_start_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder_data(write_folder(tmp_path / "root", {"train": 2}))
    first = open_cache(data)
    with nothing_is_decoded(monkeypatch):
        assert open_cache(data) == first
    # Other settings, another file: another cache.
    assert open_cache(data.model_copy(update={"fit": "pad"})).path != first.path
    (tmp_path / "root" / "train" / "red" / "0.png").unlink()
    assert open_cache(data).counts == {"train": 5}


def test_two_folders_that_share_a_place_have_two_caches(tmp_path: Path) -> None:
    """Of the same names, sizes and times, as after an archive was unpacked with fixed times."""
    images = []
    for name, color in (("a", (0, 0, 0)), ("b", (9, 9, 9))):
        root = write_folder(tmp_path / name, {"train": 1})
        for file in root.rglob("*.png"):
            Image.new("RGB", (12, 12), color).save(file, "BMP")  # not compressed: all have one size
            os.utime(file, ns=(10**18, 10**18))
        images.append(pixels(open_cache(folder_data(root, cache=str(tmp_path / "shared")))))
    assert [int(each.max()) for each in images] == [0, 9]


def test_a_cache_among_the_images_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 1})
    with pytest.raises(UserError, match=r"^data.cache=.*train/cache: is within train/ of data.root; choose a folder"):
        open_cache(folder_data(root, cache=str(root / "train" / "cache")))
    assert not (root / "train" / "cache").exists()
    assert open_cache(folder_data(root, cache=str(root / "cache"))).counts == {"train": 3}


@pytest.mark.parametrize(
    ("error", "reason"),
    [(PermissionError(13, "Permission denied"), "Permission denied"), (MemoryError(), "does not fit in memory")],
)
def test_a_file_that_can_not_be_read_for_now_is_not_left_out_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    data = folder_data(write_folder(tmp_path / "root", {"train": 2}), skip_broken=True)
    opened = Image.open

    def fail(path: str, **options: Any) -> Any:
        if path.endswith("red/1.png"):
            raise error
        return opened(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        for chosen in (data, folder_data(tmp_path / "root")):
            with pytest.raises(UserError, match=rf"1 file can't be read now; (?s:.*)red/1.png: .* now \({reason}\)"):
                open_cache(chosen)
    assert open_cache(data).counts == {"train": 6}
    error = OSError(22, "Invalid argument")  # where a damaged file lets Pillow seek
    (tmp_path / "root" / "train" / "red" / "1.png").touch()
    monkeypatch.setattr(Image, "open", fail)
    assert open_cache(data).broken == {"train/red/1.png": "Invalid argument"}


def test_a_folder_that_is_moved_with_its_cache_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_cache(folder_data(write_folder(tmp_path / "root", {"train": 1})))
    (tmp_path / "moved").mkdir()
    for name in ("root", "root.cache"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    with nothing_is_decoded(monkeypatch):
        assert open_cache(folder_data(tmp_path / "moved" / "root")).fingerprint == first.fingerprint


def test_a_group_that_may_write_beside_the_folder_may_write_its_cache(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        cache = open_cache(folder_data(write_folder(tmp_path / "root", {"train": 1})))
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (cache.path, cache.path.parent)} == {"0o775"}
    assert [path.name for path in cache.path.parent.glob(".new-*")] == []


def test_an_image_that_is_altered_in_place_is_decoded_again(tmp_path: Path) -> None:
    """A file of the same name and size; only the time of its modification says that it has other pixels."""
    data = folder_data(write_folder(tmp_path / "root", {"train": 2}), stored_size=6)
    altered = tmp_path / "root" / "train" / "red" / "1.png"
    sizes = set()
    for modified_ns, color in ((10**18, (200, 100, 0)), (10**18 + 1000, (0, 100, 200))):
        Image.new("RGB", (6, 6), color).save(altered, "BMP")
        os.utime(altered, ns=(modified_ns, modified_ns))
        sizes.add(altered.stat().st_size)
        assert pixels(open_cache(data))[5].tolist() == [[list(color)] * 6] * 6
    assert len(sizes) == 1


def test_images_of_another_size_or_number_of_channels_have_another_cache(tmp_path: Path) -> None:
    data = folder_data(write_folder(tmp_path / "root", {"train": 2}))
    caches = [open_cache(data.model_copy(update=keys)) for keys in ({}, {"stored_size": 8}, {"channels": 1})]
    assert [cache.shape for cache in caches] == [(6, 12, 12, 3), (6, 8, 8, 3), (6, 12, 12)]


def test_a_cache_of_another_version_of_the_decoding_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder_data(write_folder(tmp_path / "root", {"train": 2}))
    first = open_cache(data)
    for module, name, other in ((cache_module, "_FORMAT", 10**6), (cache_module.PIL, "__version__", "0.1")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, other)
            assert open_cache(data).path != first.path
    assert open_cache(data).path == first.path


def test_a_faulty_layout_is_refused_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "root", {"train": 2})
    (root / "train" / "empty").mkdir()
    with nothing_is_decoded(monkeypatch), pytest.raises(UserError, match="1 fault of the layout"):
        open_cache(folder_data(root, skip_broken=True))


def test_an_altered_or_incomplete_cache_is_written_again(tmp_path: Path) -> None:
    data = folder_data(write_folder(tmp_path / "root", {"train": 2}))
    first = open_cache(data)
    right = pixels(first)
    for damage in (lambda file: file.write_bytes(b"\x01" * right.size), lambda file: file.write_bytes(b"")):
        damage(first.path / "images.bin")
        assert np.array_equal(pixels(open_cache(data)), right)
    labels = first.path / "labels.npy"
    for change in (
        labels.unlink,
        lambda: labels.write_bytes(b""),
        lambda: np.save(labels, np.array([2, 0, 1, 1, 2, 2])),
    ):
        change()
        assert open_cache(data).labels().tolist() == [0, 0, 1, 1, 2, 2]
    about = first.path / "about.json"
    stored = json.loads(about.read_text())
    for part in stored:
        about.write_text(json.dumps(stored | {part: [1]}))
        assert (open_cache(data).labels().tolist(), open_cache(data).counts) == ([0, 0, 1, 1, 2, 2], {"train": 6})


def test_a_cache_that_is_altered_with_its_size_and_time_as_they_were_is_written_again(tmp_path: Path) -> None:
    data = folder_data(write_folder(tmp_path / "root", {"train": 2}))
    first = open_cache(data)
    right, images = pixels(open_cache(data)), first.path / "images.bin"
    before, probe = images.stat(), tmp_path / "probe"
    while not probe.exists() or probe.stat().st_ctime_ns <= before.st_ctime_ns:  # the kernel's clock has steps
        probe.write_bytes(b"")
    images.write_bytes(b"\x01" * right.size)
    os.utime(images, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert np.array_equal(pixels(open_cache(data)), right)


class Command:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_in_the_place_of_the_labels_is_not_loaded(tmp_path: Path) -> None:
    """A pickle runs what it names, and a cache may come from elsewhere with its images."""
    data = folder_data(write_folder(tmp_path / "root", {"train": 2}))
    labels = open_cache(data).path / "labels.npy"
    np.save(labels, np.array([Command(tmp_path / "loaded")] * 6, dtype=object), allow_pickle=True)
    assert open_cache(data).labels().tolist() == [0, 0, 1, 1, 2, 2]
    assert not (tmp_path / "loaded").exists()


def test_the_other_files_are_those_that_the_folder_has_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder_data(write_folder(tmp_path / "root", {"train": 2}))
    assert open_cache(data).other_files == []
    notes = tmp_path / "root" / "train" / "red" / "notes.txt"
    notes.touch()
    with nothing_is_decoded(monkeypatch):
        assert open_cache(data).other_files == ["train/red/notes.txt"]
        notes.unlink()
        assert open_cache(data).other_files == []


def test_the_root_of_the_file_system_has_no_cache_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _places(folder_data(Path("/"))) == [tmp_path / "nin"]
    assert _places(folder_data(tmp_path / "root")) == [tmp_path / "root.cache", tmp_path / "nin"]


def test_parallel_processes_write_what_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder_data(write_folder(tmp_path / "root", {"train": 3}))
    one = pixels(open_cache(data))
    shutil.rmtree(tmp_path / "root.cache")
    monkeypatch.setattr(parallel, "_CHUNK", 2)
    monkeypatch.setattr(parallel, "_FEW_BYTES", 0)
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert np.array_equal(pixels(open_cache(data)), one)


def test_gray_images_have_one_channel_and_one_color_image_makes_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grays = {"dark": (30, 30, 30), "light": (200, 200, 200)}
    root = write_folder(tmp_path / "root", {"train": 20, "test": 1}, grays)
    for file in root.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    data = folder_data(root)
    gray = open_cache(data)
    assert (gray.channels, gray.shape) == (1, (42, 12, 12))
    Image.new("RGB", (12, 12), "red").save(root / "test" / "light" / "0.png")
    assert open_cache(data).channels == 1  # test images don't decide
    # An image that is not in the sample: found while all are decoded.
    monkeypatch.setattr(parallel, "_SAMPLE", 1)
    Image.new("RGB", (12, 12), "red").save(root / "train" / "light" / "7.png")
    color = open_cache(data)
    assert (color.channels, color.shape) == (3, (42, 12, 12, 3))
    assert open_cache(data.model_copy(update={"channels": 1})).shape == (42, 12, 12)


def damage(root: Path) -> None:
    (root / "train" / "red" / "1.png").write_bytes(b"no image")
    content = (root / "train" / "blue" / "2.png").read_bytes()
    (root / "train" / "blue" / "2.png").write_bytes(content[: len(content) // 2])
    (root / "train" / "lost.png").write_bytes(content)


def test_all_broken_files_are_named_in_one_message(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 3})
    damage(root)
    with pytest.raises(UserError) as raised:
        open_cache(folder_data(root))
    remedy = "repair or remove the files, or leave them out with data.skip_broken=true"
    assert f"3 broken files; {remedy}" in str(raised.value)
    for line in (
        "train/red/1.png: not an image in a format that Pillow can read",
        "train/blue/2.png: damaged (",
        "train/lost.png: in no class's folder",
    ):
        assert line in str(raised.value)
    assert not (tmp_path / "root.cache").exists()  # nothing is written for what is refused


def test_broken_files_can_be_left_out(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 3, "test": 1})
    damage(root)
    cache = open_cache(folder_data(root, skip_broken=True))
    assert list(cache.broken) == ["train/blue/2.png", "train/lost.png", "train/red/1.png"]
    assert cache.counts == {"train": 7, "test": 3}
    assert cache.labels().tolist() == [0, 0, 1, 1, 1, 2, 2, 0, 1, 2]
    assert np.array_equal(pixels(cache)[6], to_pixels(open_image(root / "train/red/2.png")))
    assert np.array_equal(pixels(cache)[9], to_pixels(open_image(root / "test/red/0.png")))


def test_a_cache_without_the_broken_files_is_not_that_of_a_folder_that_may_have_none(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 2, "test": 1})
    (root / "train" / "red" / "1.png").write_bytes(b"no image")
    assert open_cache(folder_data(root, skip_broken=True)).counts == {"train": 5, "test": 3}
    with pytest.raises(UserError, match=r"train/red/1.png: not an image"):
        open_cache(folder_data(root))


def test_a_class_whose_images_are_all_broken_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 1, "test": 1})
    for file in (root / "train" / "red" / "0.png", *(root / "test").rglob("*.png")):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"(?s)train/red: no usable image.*test/: no usable image"):
        open_cache(folder_data(root, skip_broken=True))


def test_a_folder_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "root", {"train": 2})
    decode_files = parallel.decode_files

    def change(*arguments: object) -> object:
        decoded = decode_files(*arguments)
        (root / "train" / "red" / "0.png").unlink()
        Image.new("L", (5, 5)).save(root / "train" / "red" / "1.png")
        Image.new("L", (5, 5)).save(root / "train" / "red" / "2.png")
        return decoded

    monkeypatch.setattr(parallel, "decode_files", change)
    with pytest.raises(UserError) as raised:
        open_cache(folder_data(root, channels=3))
    lines = str(raised.value).splitlines()
    assert "changed while it was read" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "train/red/0.png: removed", "train/red/1.png: altered", "train/red/2.png: new",
    ]  # fmt: skip


def test_the_cache_is_elsewhere_where_the_place_beside_the_root_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path / "root", {"train": 2})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "root.cache").write_text("a file where the folder would be")
    assert open_cache(folder_data(root)).path.parent == tmp_path / "home" / "nin"
    chosen = folder_data(root, cache=str(tmp_path / "chosen"))
    assert open_cache(chosen).path.parent == tmp_path / "chosen"
    with pytest.raises(UserError, match=r"data.cache: can't be written: .*root.cache \(.*set it to a folder"):
        open_cache(folder_data(root, cache=str(tmp_path / "root.cache")))


def test_a_user_without_a_home_folder_has_the_cache_beside_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert open_cache(folder_data(write_folder(tmp_path / "root", {"train": 2}))).path.parent == tmp_path / "root.cache"


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 2})
    first = open_cache(folder_data(root))
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copy)
    copied = open_cache(folder_data(tmp_path / "copy"))
    assert copied.fingerprint == first.fingerprint
    Image.new("L", (12, 12)).save(tmp_path / "copy" / "train" / "red" / "1.png")
    assert open_cache(folder_data(tmp_path / "copy")).fingerprint != first.fingerprint
    assert json.loads((first.path / "about.json").read_text())["root"] == str(root)


def test_a_link_in_the_place_of_the_cache_is_not_written_through(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 2})
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "root.cache").mkdir()
    (tmp_path / "root.cache" / ".gitignore").symlink_to(tmp_path / "precious")
    open_cache(folder_data(root))
    assert (tmp_path / "precious").read_text() == "precious"
