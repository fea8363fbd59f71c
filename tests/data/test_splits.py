from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nin.config.schema import Settings, UserError
from nin.data.cache import Cache, open_cache
from nin.data.module import ImageDataModule
from nin.data.splits import (
    describe_folder,
    describe_split,
    open_folder,
    require_enough_images,
    require_training_images,
    split_folder,
    with_channels,
)
from pictures import folder_data, write_folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Of 24 training images, 8 of each class."""
    return open_cache(folder_data(write_folder(tmp_path_factory.mktemp("data") / "root", {"train": 8})))


def test_missing_parts_are_split_off_with_the_classes_in_proportion(cache: Cache) -> None:
    data = folder_data(Path("/"))  # a quarter each
    rows = split_folder(cache, data, seed=0)
    assert sorted(np.concatenate(list(rows.values()))) == list(range(24))
    labels = cache.labels()
    assert {part: np.bincount(labels[rows[part]]).tolist() for part in rows} == {
        "train": [4, 4, 4], "val": [2, 2, 2], "test": [2, 2, 2],
    }  # fmt: skip
    assert all(rows[part].tolist() == sorted(rows[part]) for part in rows)


def test_the_split_depends_only_on_the_seed(cache: Cache) -> None:
    data = folder_data(Path("/"))
    # Exact values: the split must be the same on every machine and in every version.
    assert split_folder(cache, data, seed=0)["test"].tolist() == EXPECTED
    assert split_folder(cache, data.model_copy(update={"val_size": 3}), seed=0)["test"].tolist() == EXPECTED
    assert split_folder(cache, data, seed=1)["test"].tolist() != EXPECTED
    assert describe_split(cache, data, seed=3) == {
        "val_split": "6 of 24 training images, chosen by seed 3",
        "test_split": "6 of 24 training images, chosen by seed 3",
    }


EXPECTED = [2, 4, 10, 11, 18, 21]


def test_parts_that_the_folder_has_are_used_as_they_are(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 2, "val": 1, "test": 1})
    cache, data = open_cache(folder_data(root)), folder_data(root)
    rows = split_folder(cache, data, seed=0)
    assert {part: values.tolist() for part, values in rows.items()} == {
        "train": [0, 1, 2, 3, 4, 5], "val": [6, 7, 8], "test": [9, 10, 11],
    }  # fmt: skip
    assert describe_split(cache, data, seed=0) == {}


def test_the_classes_and_parts_of_a_folder_are_described_in_a_line(tmp_path: Path) -> None:
    classes = {f"class {i}": (30 * i, 0, 0) for i in range(7)}
    root = write_folder(tmp_path / "few" / "root", {"train": 8, "val": 2})
    assert describe_folder(folder_data(root, test_size=6), seed=0) == (
        "3 classes (blue, green, red); 18 training images (train/), 6 validation images (val/), 6 test images (held "
        "out of train/)"
    )
    root = write_folder(tmp_path / "many" / "root", {"train": 1, "val": 1, "test": 1}, classes)
    listed = "class 0, class 1, class 2, class 3, class 4, and 2 more"
    assert describe_folder(folder_data(root), seed=0).startswith(f"7 classes ({listed}); 7 training images (train/), 7")


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        ({"val_size": 0}, ["data.val_size=0: leaves no validation images, and data.root has no val/"]),
        ({"test_size": 0.01, "val_size": 0.01}, ["data.val_size=0.01", "data.test_size=0.01"]),
        ({"test_size": 20, "val_size": 4}, ["data.root: there are 24 training images, and none is left after 24"]),
    ],
)
def test_too_few_images_are_refused(cache: Cache, keys: dict[str, object], messages: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        require_enough_images(cache, folder_data(Path("/"), **keys))
    for error, message in zip(raised.value.errors, messages, strict=True):
        assert error.startswith(message)


def test_a_class_without_an_image_to_train_on_and_a_larger_batch_are_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 8, "test": 1})
    require_training_images(folder_data(root, batch_size=18), seed=0)  # 24 less 6
    for path in [*(root / "train" / "red").iterdir()][1:] + [*(root / "train" / "blue").iterdir()][1:]:
        path.unlink()
    few = folder_data(root, val_size=0.8, batch_size=9)
    with pytest.raises(UserError) as raised:
        require_training_images(few, seed=0)
    first, second = raised.value.errors
    assert first.startswith("data.root: all training images of blue, red are held out; add images, or hold out fewer")
    assert second == "data.batch_size=9: there are 2 training images after 8 are held out; choose at most that"
    open_folder(few)  # for a test or an export they are enough


def test_without_validation_images_the_test_images_can_be_scored(cache: Cache) -> None:
    require_enough_images(cache, folder_data(Path("/"), val_size=0, score_each_epoch="test"))


def test_the_images_of_another_folder_have_the_channels_of_the_network(
    tmp_path: Path, settings: Callable[..., Settings]
) -> None:
    gray = folder_data(write_folder(tmp_path, {"train": 4}, {"dark": (9, 9, 9), "light": (99, 99, 99)}))
    for path in tmp_path.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert open_folder(gray).channels == 1
    chosen = settings().model_copy(update={"data": gray})
    assert with_channels(chosen, 1) is chosen
    assert open_folder(with_channels(chosen, 3).data).shape == (8, 12, 12, 3)
    assert with_channels(settings(), 3) is settings()  # garments, which are gray


def test_a_folder_with_test_images_is_tested_on_though_it_is_too_small_to_train_on(tmp_path: Path) -> None:
    data = folder_data(write_folder(tmp_path / "root", {"train": 1, "test": 2}), val_size=500)
    assert len(split_folder(open_folder(data), data, seed=0)["test"]) == 6
    with pytest.raises(UserError, match="3 training images, and none is left after 500 are held out"):
        require_training_images(data, seed=0)


def test_a_folder_of_test_images_alone_is_tested_on_and_not_trained_on(tmp_path: Path) -> None:
    data = folder_data(write_folder(tmp_path / "root", {"test": 2}))
    module = ImageDataModule(data)
    module.prepare_data()
    module.setup("test")
    assert (module.class_names, module.channels) == (("blue", "green", "red"), 3)
    assert sorted(module.test[1].tolist()) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(UserError, match="root: has no folder train; it must hold train/<class>"):
        require_training_images(data, seed=0)
    (tmp_path / "root" / "train").touch()
    with pytest.raises(UserError, match="train: not a folder, or a link to nothing"):
        open_folder(data, again=True)


def test_a_part_with_a_similar_name_is_refused_where_training_images_would_be_held_out_instead(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", {"train": 12})
    (root / "Valid").mkdir()
    (root / "Test").mkdir()
    with pytest.raises(UserError) as refused:
        require_training_images(folder_data(root, batch_size=2), seed=0)
    assert refused.value.errors == (
        "data.root: Test/ is not read; the images must be in test/: rename or move it",
        "data.root: Valid/ is not read; the images must be in val/: rename or move it",
    )
    assert open_folder(folder_data(root, batch_size=2)).other_files == ["Test/", "Valid/"]  # for nin eval: named
    more = folder_data(write_folder(root, {"val": 1, "test": 1}), batch_size=3)
    require_training_images(more, seed=0)
