import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from nin.data.garments import garment
from nin.data.transforms import augment, max_shift, resize


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [14, 28, 67, 224])
def test_resizing_equals_pil_within_one_gray_level(size: int, channels: int) -> None:
    random = np.random.default_rng(0)
    if channels == 1:
        noise = random.integers(0, 256, (1, 28, 28), np.uint8)
        images = np.concatenate([[garment(label, random) for label in range(10)], noise])
    else:
        images = random.integers(0, 256, (3, 32, 32, 3), np.uint8)
    pil = transforms.Compose([transforms.Resize(size), transforms.ToTensor()])
    expected = torch.stack([pil(Image.fromarray(image)) for image in images])
    ours = resize(torch.from_numpy(images), size)
    assert ours.shape == (len(images), channels, size, size)
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().max() <= 1 / 255 + 1e-6


def test_flip_mirrors_about_half_of_the_images() -> None:
    torch.manual_seed(0)
    images = torch.arange(28, dtype=torch.uint8).expand(1000, 28, 28)
    flipped = (augment(images, "flip")[:, 0, 0] == 27).sum()
    assert 450 < flipped < 550


def test_shifts_are_up_to_two_pixels_and_padded_with_zeros() -> None:
    torch.manual_seed(0)
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[10, 10] = 9
    moved = augment(image.expand(2000, 28, 28), "flip_shift")
    assert (moved.sum((1, 2)) == 9).all()
    rows, columns = {tuple(i) for i in moved.nonzero()[:, 1:2].tolist()}, moved.nonzero()[:, 2].unique().tolist()
    assert rows == {(8,), (9,), (10,), (11,), (12,)}
    assert columns == [8, 9, 10, 11, 12, 15, 16, 17, 18, 19]
    corner = torch.full((500, 28, 28), 7, dtype=torch.uint8)
    assert set(augment(corner, "flip_shift").unique().tolist()) == {0, 7}


def test_no_augmentation_returns_the_images() -> None:
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    assert augment(images, "none") is images


@pytest.mark.parametrize("name", ["flip", "flip_shift"])
def test_color_images_are_augmented_as_gray_ones(name: str) -> None:
    gray = torch.randint(0, 256, (50, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    expected = augment(gray, name)
    torch.manual_seed(0)
    assert torch.equal(augment(gray[..., None].expand(-1, -1, -1, 3), name), expected[..., None].expand(-1, -1, -1, 3))


def test_shifts_grow_with_the_images() -> None:
    assert [max_shift(size) for size in (12, 28, 32, 64, 224)] == [2, 2, 4, 8, 28]


@pytest.mark.parametrize("name", ["erase", "trivial"])
@pytest.mark.parametrize("shape", [(20, 32, 32), (20, 32, 32, 3)])
def test_torchvisions_operations_depend_on_torchs_random_state_only(shape: tuple[int, ...], name: str) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    torch.manual_seed(1)
    first = augment(images, name)
    state = torch.get_rng_state()
    second = augment(images, name)
    assert (first.shape, first.dtype) == (images.shape, torch.uint8)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(augment(images, name), second)


@pytest.mark.parametrize(("name", "operation"), [("erase", v2.RandomErasing), ("trivial", v2.TrivialAugmentWide)])
def test_torchvisions_operations_change_images_that_are_flipped_and_shifted(
    name: str, operation: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(0, 256, (20, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    expected = augment(images, "flip_shift")
    monkeypatch.setattr(operation, "forward", lambda self, group: 255 - group)
    torch.manual_seed(0)
    assert torch.equal(augment(images, name), 255 - expected)


def test_trivial_augmentation_changes_every_eight_images_in_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    operation = v2.TrivialAugmentWide.forward
    monkeypatch.setattr(
        v2.TrivialAugmentWide, "forward", lambda self, group: sizes.append(group.shape) or operation(self, group)
    )
    augment(torch.zeros(20, 32, 32, 3, dtype=torch.uint8), "trivial")
    assert sizes == [(8, 3, 32, 32), (8, 3, 32, 32), (4, 3, 32, 32)]


def test_erasing_sets_one_rectangle_of_half_of_the_groups_to_zero() -> None:
    torch.manual_seed(0)
    images = torch.full((8 * 200, 32, 32), 9, dtype=torch.uint8)
    erased = 0
    # Shifts leave zeros at the edges only, of up to `max_shift` pixels.
    for group in augment(images, "erase")[:, 4:-4, 4:-4].split(8):
        assert (group == group[0]).all()
        if (zeros := group[0] == 0).any():
            erased += 1
            rows, columns = zeros.any(1).nonzero(), zeros.any(0).nonzero()
            assert zeros[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
            assert zeros.sum() <= 0.35 * 32 * 32
    assert 70 < erased < 110  # rectangles that lie in the edges are not counted
