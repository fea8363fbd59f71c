from collections.abc import Callable

import torch

from nin.config.schema import Settings
from nin.data.module import Batches, ImageDataModule, split

EXPECTED = [3, 20, 22, 25, 42, 48, 86, 89, 92, 93]


def labels_of(batches: Batches) -> list[list[int]]:
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
    batches = Batches(*numbered(10), batch_size=4, seed=0, epoch=lambda: epoch)
    first, again = labels_of(batches), labels_of(batches)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert len(batches) == 3
    assert first == again
    assert sorted(label for batch in first for label in batch) == list(range(10))
    epoch = 1
    assert labels_of(batches) != first
    assert labels_of(Batches(*numbered(10), batch_size=4, seed=1)) != first


def test_without_a_seed_the_order_of_the_images_is_kept() -> None:
    assert labels_of(Batches(*numbered(5), batch_size=2)) == [[0, 1], [2, 3], [4]]


def test_resuming_in_the_middle_of_an_epoch_gives_its_remaining_images() -> None:
    batches = Batches(*numbered(10), batch_size=3, seed=0)
    complete = labels_of(batches)
    iterator = iter(batches)
    first = [next(iterator)[1].tolist() for _ in range(2)]
    other = Batches(*numbered(10), batch_size=3, seed=0)
    other.load_state_dict(batches.state_dict())
    assert first + labels_of(other) == complete
    assert labels_of(other) == complete  # the next time all of them


def test_after_an_unfinished_iteration_the_next_one_starts_from_the_beginning() -> None:
    batches = Batches(*numbered(6), batch_size=2)
    next(iter(batches))
    assert labels_of(batches) == [[0, 1], [2, 3], [4, 5]]


def test_a_position_in_another_epoch_is_ignored() -> None:
    batches = Batches(*numbered(6), batch_size=2, seed=0, epoch=lambda: 1)
    batches.load_state_dict({"epoch": 0, "batch": 2})
    assert len(labels_of(batches)) == 3


def test_the_data_module_works_without_a_trainer(settings: Callable[..., Settings]) -> None:
    chosen = settings("data.augment=flip", "data.image_size=32")
    module = ImageDataModule(chosen.data, seed=0)
    assert module.info.class_names[9] == "Ankle boot"
    assert (module.info.channels, module.info.stored_size) == (1, 28)
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
