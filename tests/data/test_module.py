import torch

from nin.data.module import Batches, split

EXPECTED = [3, 20, 22, 25, 42, 48, 86, 89, 92, 93]


def labels_of(batches: Batches) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches]


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(count, 28, 28, dtype=torch.uint8), torch.arange(count)


def test_the_split_hangs_on_the_seed_alone() -> None:
    held_out, kept = split(100, 10, seed=3)
    assert sorted([*held_out.tolist(), *kept.tolist()]) == list(range(100))
    # Exact values: the split must be the same on every machine and in every version.
    assert held_out.tolist() == EXPECTED
    torch.manual_seed(9)
    assert split(100, 10, seed=3)[0].tolist() == EXPECTED
    assert split(100, 10, seed=4)[0].tolist() != EXPECTED
    assert split(100, 0, seed=0)[1].tolist() == list(range(100))


def test_every_image_once_an_epoch_in_an_order_of_its_own() -> None:
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


def test_without_a_seed_the_files_order_is_kept() -> None:
    assert labels_of(Batches(*numbered(5), batch_size=2)) == [[0, 1], [2, 3], [4]]


def test_going_on_in_the_middle_of_an_epoch_gives_the_images_that_are_left() -> None:
    batches = Batches(*numbered(10), batch_size=3, seed=0)
    whole = labels_of(batches)
    iterator = iter(batches)
    prepare_images = [next(iterator)[1].tolist() for _ in range(2)]
    other = Batches(*numbered(10), batch_size=3, seed=0)
    other.load_state_dict(batches.state_dict())
    assert prepare_images + labels_of(other) == whole
    assert labels_of(other) == whole  # and the next time all of them


def test_a_pass_that_was_broken_off_is_begun_anew() -> None:
    batches = Batches(*numbered(6), batch_size=2)
    next(iter(batches))
    assert labels_of(batches) == [[0, 1], [2, 3], [4, 5]]


def test_a_place_in_another_epoch_is_not_this_epochs() -> None:
    batches = Batches(*numbered(6), batch_size=2, seed=0, epoch=lambda: 1)
    batches.load_state_dict({"epoch": 0, "batch": 2})
    assert len(labels_of(batches)) == 3
