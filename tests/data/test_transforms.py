import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from nin.data.garments import garment
from nin.data.transforms import augment, resize


@pytest.mark.parametrize("size", [14, 28, 67, 224])
def test_resizing_equals_pil_within_one_gray_level(size: int) -> None:
    random = np.random.default_rng(0)
    images = np.stack([garment(label, random) for label in range(10)] + [random.integers(0, 256, (28, 28), np.uint8)])
    pil = transforms.Compose([transforms.Resize(size), transforms.ToTensor()])
    expected = torch.stack([pil(Image.fromarray(image)) for image in images])
    ours = resize(torch.from_numpy(images), size)
    assert ours.shape == (11, 1, size, size)
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
