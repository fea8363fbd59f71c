from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nin.config.composition import compose_settings
from nin.config.schema import OwnData, Settings, UserError
from nin.data.module import ImageDataModule, MappedImages, TensorDataLoader, split
from pictures import folder_data, write_folder

EXPECTED = [3, 20, 22, 25, 42, 48, 86, 89, 92, 93]


def labels_of(batches: TensorDataLoader) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches]


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(count, 28, 28, dtype=torch.uint8), torch.arange(count)


def test_the_split_depends_only_on_the_seed() -> None:
    held_out, kept = split(100, 10, seed=3)
    assert sorted([*held_out.tolist(), *kept.tolist()]) == list(range(100))
    # Exact values: the split must be the same on every machine and in every version.
    assert held_out.tolist() == EXPECTED
    torch.manual_seed(9)
    assert split(100, 10, seed=3)[0].tolist() == EXPECTED
    assert split(100, 10, seed=4)[0].tolist() != EXPECTED
    assert split(100, 0, seed=0)[1].tolist() == list(range(100))


def test_every_epoch_has_every_image_once_in_its_own_order() -> None:
    epoch = 0
    batches = TensorDataLoader(*numbered(10), batch_size=4, seed=0, epoch=lambda: epoch)
    first, again = labels_of(batches), labels_of(batches)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert len(batches) == 3
    assert first == again
    assert sorted(label for batch in first for label in batch) == list(range(10))
    epoch = 1
    assert labels_of(batches) != first
    assert labels_of(TensorDataLoader(*numbered(10), batch_size=4, seed=1)) != first


def test_without_a_seed_the_order_of_the_images_is_kept() -> None:
    assert labels_of(TensorDataLoader(*numbered(5), batch_size=2)) == [[0, 1], [2, 3], [4]]


def test_processes_share_every_batch_and_train_on_no_empty_one() -> None:
    one = [label for batch in labels_of(TensorDataLoader(*numbered(9), batch_size=2, seed=0)) for label in batch]
    shares = [TensorDataLoader(*numbered(9), batch_size=2, seed=0, rank=rank, world_size=2) for rank in (0, 1)]
    assert [len(share) for share in shares] == [2, 2]  # of the ninth image, one process would have none
    assert [labels_of(share) for share in shares] == [[one[0:4:2], one[4:8:2]], [one[1:4:2], one[5:8:2]]]
    # Without a seed, as in a validation, no image is left out.
    shares = [TensorDataLoader(*numbered(9), batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert [len(share) for share in shares] == [3, 3]
    assert [labels_of(share) for share in shares] == [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7], []]]


@pytest.mark.parametrize(("images", "sizes"), [(15, [3, 3]), (16, [3, 3, 2])])
def test_the_last_training_batch_is_kept_if_every_process_has_two_images_of_it(images: int, sizes: list[int]) -> None:
    shares = [TensorDataLoader(*numbered(images), batch_size=3, seed=0, rank=rank, world_size=2) for rank in (0, 1)]
    assert [[len(batch) for batch in labels_of(share)] for share in shares] == [sizes, sizes]


def test_a_process_loads_its_own_share_of_the_batches(settings: Callable[..., Settings]) -> None:
    module = ImageDataModule(settings().data, seed=0)
    module.setup()
    everything = [images for images, _ in module.test_dataloader()]
    trainer: Any = SimpleNamespace(
        current_epoch=0, overfit_batches=0.0, global_rank=1, world_size=2, training=False,
    )  # fmt: skip
    module.trainer = trainer
    for batches in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        assert (batches.rank, batches.world_size) == (1, 2)
    assert torch.equal(next(iter(module.test_dataloader()))[0], torch.cat(everything[:2])[1::2])


def test_resuming_in_the_middle_of_an_epoch_gives_its_remaining_images() -> None:
    batches = TensorDataLoader(*numbered(10), batch_size=3, seed=0)
    complete = labels_of(batches)
    iterator = iter(batches)
    first = [next(iterator)[1].tolist() for _ in range(2)]
    other = TensorDataLoader(*numbered(10), batch_size=3, seed=0)
    other.load_state_dict(batches.state_dict())
    assert first + labels_of(other) == complete
    assert labels_of(other) == complete  # the next time all of them


def test_after_an_unfinished_iteration_the_next_one_starts_from_the_beginning() -> None:
    batches = TensorDataLoader(*numbered(6), batch_size=2)
    next(iter(batches))
    assert labels_of(batches) == [[0, 1], [2, 3], [4, 5]]


def test_a_position_in_another_epoch_is_ignored() -> None:
    batches = TensorDataLoader(*numbered(6), batch_size=2, seed=0, epoch=lambda: 1)
    batches.load_state_dict({"epoch": 0, "batch": 2})
    assert len(labels_of(batches)) == 3


def test_the_data_module_works_without_a_trainer(settings: Callable[..., Settings]) -> None:
    chosen = settings("data.augment=flip", "data.image_size=32")
    module = ImageDataModule(chosen.data, seed=0)
    assert module.class_names[9] == "Ankle boot"
    assert module.channels == 1
    module.prepare_data()
    module.setup("fit")
    assert (len(module.train[1]), len(module.val[1])) == (9000, 1000)
    first, again = (next(iter(module.train_dataloader())) for _ in range(2))
    assert torch.equal(first[1], again[1])
    assert (first[0].dtype, first[0].device.type, first[0].shape) == (torch.uint8, "cpu", (32, 28, 28))
    images, labels = module.on_after_batch_transfer(first, 0)
    assert (images.shape, images.dtype, float(images.max()) <= 1) == ((32, 1, 32, 32), torch.float32, True)
    assert torch.equal(labels, first[1])
    module.setup("test")
    for batches in (module.test_dataloader(), module.predict_dataloader()):
        assert sum(len(labels) for _, labels in batches) == 2000


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (
            ["experiment=cpu", "data=mnist"],
            "data.augment=flip data.test_time_flip=true mirrors the characters of mnist",
        ),
        (["data=kmnist", "data.augment=trivial"], "data.augment=trivial mirrors the characters of kmnist"),
        (["data=mnist", "data.test_time_flip=true"], "data.test_time_flip=true mirrors the characters of mnist"),
        (["experiment=cpu", "data=mnist", "data.augment=none", "data.test_time_flip=false"], None),
        (["experiment=cpu"], None),
    ],
)
def test_a_run_that_mirrors_characters_warns(
    overrides: list[str], warned: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = np.zeros((4, 28, 28), np.uint8), np.zeros(4, np.int64)
    monkeypatch.setattr("nin.data.module.load", lambda *_: four)
    data = ImageDataModule(compose_settings([*overrides, "data.val_size=1"]).data)
    data.setup("test")
    assert caplog.messages == []
    data.setup("fit")
    remedy = ", some of which then are other characters; data.augment=none data.test_time_flip=false does not"
    assert caplog.messages == ([warned + remedy] if warned else [])


def test_setup_without_a_stage_sets_up_all_parts(data_root: Path) -> None:
    data = compose_settings(["data=garments", "model=nin_small", f"data.root={data_root}"]).data
    assert not isinstance(data, OwnData)
    module = ImageDataModule(data)
    module.setup()
    assert [len(part[1]) for part in (module.train, module.val, module.test)] == [9000, 1000, 2000]


def test_a_folder_gives_color_batches_and_says_what_was_split_off(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 8, "val": 2})
    module = ImageDataModule(folder_data(root, image_size=6, batch_size=5))
    module.prepare_data()
    module.setup()
    images, labels = next(iter(module.train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((5, 12, 12, 3), torch.uint8, torch.int64)
    assert module.transform_images(images).shape == (5, 3, 6, 6)
    assert [len(part[1]) for part in (module.train, module.val, module.test)] == [18, 6, 6]
    assert module.notes == {
        "test_split": "6 of 24 training images, chosen by seed 0",
        "images_sha256": module.state_dict()["fingerprint"],
        "images": {"train": 24, "val": 6},
    }
    for images, labels in (module.val, module.test):
        # The channel that is largest in each class's color: blue, green, red.
        assert images.float().mean((1, 2)).argmax(1).tolist() == (2 - labels).tolist()
        # Also the first batches, which are all that a limit leaves, have every class.
        assert sorted(labels[:3].tolist()) == sorted(labels[3:].tolist()) == [0, 1, 2]


def test_more_images_than_the_limit_are_read_by_batch_and_are_the_same(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 8})
    in_memory, mapped = (ImageDataModule(folder_data(root, memory_limit_mib=limit), seed=1) for limit in (1, 0))
    for module in (in_memory, mapped):
        module.setup("fit")
    assert isinstance(in_memory.train[0], torch.Tensor)  # 24 images of 432 bytes
    assert isinstance(mapped.train[0], MappedImages)
    assert len(mapped.train[0]) == 12
    batches = zip(in_memory.train_dataloader(), mapped.train_dataloader(), strict=True)
    assert all(torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) for ours, theirs in batches)
    assert torch.equal(in_memory.test[0][2:5], mapped.test[0][2:5])


@pytest.mark.parametrize(("device", "limit", "warnings"), [("meta", 0, 1), ("meta", 1, 0), ("cpu", 0, 0)])
def test_images_that_are_not_stored_on_the_gpu_are_warned_of(
    device: str, limit: int, warnings: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = ImageDataModule(folder_data(write_folder(tmp_path / "root", {"train": 8}), memory_limit_mib=limit), seed=1)
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))  # type: ignore[assignment]
    module.setup("fit")
    assert caplog.text.count("above data.memory_limit_mib=0: each batch is copied") == warnings


def test_statistics_are_those_of_each_channel_of_all_training_images(tmp_path: Path) -> None:
    module = ImageDataModule(folder_data(write_folder(tmp_path / "root", {"train": 8})))
    module.setup("fit")
    images, labels = module.train
    assert images.shape == (12, 12, 12, 3)
    # Each image 5000 times, one after another: 25 MiB, of which the first 16 have more of the first class.
    module.train = MappedImages(images, torch.arange(12).repeat_interleave(5000)), labels
    mean, deviation = module.compute_statistics()
    pixels = images.numpy().reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(deviation, pixels.std(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("are_moved", [False, True])
def test_a_run_is_not_resumed_with_other_images_or_with_them_in_other_parts(are_moved: bool, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 8, "val": 2})
    module = ImageDataModule(folder_data(root), seed=0)
    module.setup("fit")
    state = module.state_dict()
    module.load_state_dict(state)
    if are_moved:
        (root / "val").rename(root / "test")
    else:
        (root / "train" / "red" / "0.png").unlink()
    other = ImageDataModule(folder_data(root), seed=0)
    other.prepare_data()
    other.setup("fit")
    assert (other.notes["images_sha256"] == state["fingerprint"]) is are_moved
    with pytest.raises(UserError, match="has other images than those the run was started with, or in other parts, so"):
        other.load_state_dict(state)


def test_a_class_that_is_held_out_completely_can_be_scored_but_not_trained(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"train": 8, "test": 1})
    for path in list((root / "train" / "red").iterdir())[1:]:
        path.unlink()
    with pytest.raises(UserError, match="all training images of red are held out"):
        ImageDataModule(folder_data(root, val_size=0.8), seed=0).setup("fit")
    module = ImageDataModule(folder_data(root, val_size=0.8), seed=0)
    module.setup("test")
    assert len(module.test[1]) == 3


def test_files_that_are_left_out_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folder(tmp_path / "root", {"train": 8})
    (root / "train" / "red" / "1.png").write_bytes(b"no image")
    (root / "train" / "red" / "notes.txt").touch()
    module = ImageDataModule(folder_data(root, skip_broken=True), seed=0)
    module.setup("fit")
    assert module.notes["skipped_files"] == 1
    assert "1 files are left out:\n  train/red/1.png: not an image in a format that Pillow can read" in caplog.text
    assert "files without the suffix of an image, or beside train/, are left out: train/red/notes.txt" in caplog.text
