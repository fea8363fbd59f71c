import os
import re
from pathlib import Path

import pytest

from nin.config.errors import printable
from nin.config.schema import UserError
from nin.data.folder import list_images, require_usable
from pictures import folder_data, write_folder


def test_classes_are_the_sorted_names_of_the_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 2, "test": 1})
    nested = tmp_path / "train" / "green" / "more" / "deep"
    nested.mkdir(parents=True)
    (tmp_path / "train" / "green" / "0.png").rename(nested / "0.PNG")
    (tmp_path / "train" / "red" / ".hidden.png").touch()
    (tmp_path / "train" / "red" / "notes.txt").touch()
    listing = list_images(folder_data(tmp_path))
    assert listing.class_names == ("blue", "green", "red")
    assert [(file.name, file.label) for file in listing.files["train"]] == [
        ("train/blue/0.png", 0), ("train/blue/1.png", 0), ("train/green/1.png", 1), ("train/green/more/deep/0.PNG", 1),
        ("train/red/0.png", 2), ("train/red/1.png", 2),
    ]  # fmt: skip
    assert [file.label for file in listing.files["test"]] == [0, 1, 2]
    assert "val" not in listing.files
    assert (listing.broken, listing.other_files) == ({}, ["train/red/notes.txt"])


def test_other_folders_beside_the_training_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {"train": 2})
    for name in ("raw", "cache", ".git"):
        (tmp_path / name).mkdir()
    data = folder_data(tmp_path, cache=str(tmp_path / "cache"))
    assert list_images(data).other_files == ["raw/"]
    (tmp_path / "loop").symlink_to("loop")  # left alone: nothing is read from it
    assert (list_images(data).other_files, list_images(data).faults) == (["raw/"], [])

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)  # a root that may be entered and not listed, as with mode 711
    assert ([*list_images(data).files], list_images(data).faults) == (["train"], [])


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", {"train": 2})
    root = tmp_path / "root"
    root.mkdir()
    (root / "train").symlink_to(tmp_path / "elsewhere" / "train")
    assert len(list_images(folder_data(root)).files["train"]) == 6


def test_all_faults_of_the_layout_are_in_one_message(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 1, "test": 1})
    train, test = tmp_path / "train", tmp_path / "test"
    (train / "empty").mkdir()
    (test / "zebra").mkdir()
    (tmp_path / "val").mkdir()
    (train / "red" / "circle").symlink_to(train / "red")
    (train / "red" / "itself").symlink_to(train / "red" / "itself")
    Path(os.fsdecode(os.fsencode(train) + b"/caf\xe9")).mkdir()
    (train / "lost.png").touch()
    listing = list_images(folder_data(tmp_path))
    with pytest.raises(UserError) as raised:
        require_usable(listing, listing.broken, folder_data(tmp_path))
    message = str(raised.value)
    for line in (
        r"train/empty: no images",
        r"test/zebra: a class without training images",
        r"val/: no images",
        r"train/red/circle: a link to a folder that contains it",
        r"train/red/itself: can't be read \(.*symbolic links\)",
        r"train/lost.png: in no class's folder",
        r"train/caf\\udce9: the class's name is not UTF-8",
    ):
        assert re.search(line, message), (line, message)
    assert (
        "7 faults of the layout; correct the folder, and 1 broken file; repair" in message
    )  # the class that is not UTF-8 is empty, too


@pytest.mark.parametrize(
    ("classes", "message"),
    [({}, "train/: has no folders"), ({"red": (1, 2, 3)}, "train/red: the only class; a classifier needs two or more")],
)
def test_a_classifier_needs_two_classes(tmp_path: Path, classes: dict[str, object], message: str) -> None:
    (tmp_path / "train").mkdir()
    write_folder(tmp_path / "other", {"train": 1}, classes)
    for folder in tmp_path.glob("other/train/*"):
        folder.rename(tmp_path / "train" / folder.name)
    listing = list_images(folder_data(tmp_path))
    with pytest.raises(UserError, match=message):
        require_usable(listing, {}, folder_data(tmp_path))


def test_a_root_without_training_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    with pytest.raises(UserError, match=r"/a_file: not a folder; it must hold train/<class>"):
        list_images(folder_data(tmp_path / "a_file"))
    with pytest.raises(UserError, match=r"no such folder; it must hold train/<class>"):
        list_images(folder_data(tmp_path / "none"))
    with pytest.raises(UserError, match="has no folder train"):
        list_images(folder_data(tmp_path))


def test_files_that_can_not_be_images_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 1})
    folder = tmp_path / "train" / "red"
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(folder / "pipe.jpg")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jpg")).touch()
    (folder / "empty.jpg").touch()
    (tmp_path / "train" / "lost.jpg").touch()
    broken = {printable(name): reason for name, reason in list_images(folder_data(tmp_path)).broken.items()}
    assert broken == {
        "train/lost.jpg": "in no class's folder",
        "train/red/empty.jpg": "has no bytes",
        "train/red/gone.jpg": "a link to nothing (No such file or directory)",
        "train/red/pipe.jpg": "not a regular file",
        "train/red/\\udcff.jpg": "the name is not UTF-8",
    }


def test_names_are_printed_without_control_characters() -> None:
    assert printable("a\x1b[31m\n\udcff ä") == "a\\x1b[31m\\n\\udcff ä"


def test_a_part_that_is_no_folder_is_a_fault(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 1})
    (tmp_path / "val").symlink_to(tmp_path / "moved")
    (tmp_path / "test").touch()
    fault = "not a folder, or a link to nothing; correct or remove it"
    assert list_images(folder_data(tmp_path)).faults == [f"val: {fault}", f"test: {fault}"]
