"""Augmentation, resizing and scaling of batches of images on the training device."""

import torch
from torch import Tensor
from torch.nn import functional

# Each group of this many images gets one random operation of torchvision. Batches are in random order, so that the
# groups are other images in every epoch; an operation for each image would take longer than the network.
_GROUP = 8


def augment(images: Tensor, augmentation: str) -> Tensor:
    """Applies random changes to every image, with random numbers from torch's global generators.

    Args:
        images: ``(batch, height, width)``, any type, or ``(batch, height, width, 3)`` uint8.
        augmentation: "none", "flip" (horizontally, with probability 0.5), "flip_shift" (also shifts by up to
            `max_shift` pixels in each direction, padded with zeros), and on top of that, every eight images in the same
            way: "erase" (a random rectangle is set to zero with probability 0.5, Zhong et al. 2020) or "trivial" (one
            operation of TrivialAugment, Müller and Hutter 2021; uint8 only).
    """
    if augmentation == "none":
        return images
    flip = torch.rand(len(images), 1, 1, device=images.device) < 0.5
    images = torch.where(flip if images.ndim == 3 else flip[..., None], images.flip(2), images)
    if augmentation == "flip":
        return images
    batch, height, width = images.shape[:3]
    most = max_shift(height)
    rows, columns = torch.randint(0, 2 * most + 1, (2, batch, 1), device=images.device)
    padded = functional.pad(images, (*(0, 0) * (images.ndim - 3), *(most,) * 4))
    rows = rows + torch.arange(height, device=images.device)  # (batch, height)
    columns = columns + torch.arange(width, device=images.device)  # (batch, width)
    each = torch.arange(batch, device=images.device)[:, None, None]
    images = padded[each, rows[:, :, None], columns[:, None, :]]
    return images if augmentation == "flip_shift" else _augment_groups(images, augmentation)


def max_shift(size: int) -> int:
    """2 pixels below 32, then 4 for each full 32 of the side, as is usual for CIFAR-10: 4 at 32, 28 at 224."""
    return 4 * (size // 32) or 2


def _augment_groups(images: Tensor, augmentation: str) -> Tensor:
    # torchvision.transforms takes a second to import, and few runs need it.
    from torchvision.transforms import InterpolationMode, v2

    trivial = augmentation == "trivial"
    operation = v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR) if trivial else v2.RandomErasing()
    # torchvision takes (…, channels, height, width).
    planes = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    changed = torch.cat([operation(group) for group in planes.split(_GROUP)])
    return changed.squeeze(1) if images.ndim == 3 else changed.permute(0, 2, 3, 1)


def resize(images: Tensor, image_size: int) -> Tensor:
    """Converts ``(batch, height, width)`` uint8 to ``(batch, 1, image_size, image_size)`` float32 from 0 to 1.

    In color, ``(batch, height, width, 3)`` to ``(batch, 3, image_size, image_size)``.

    Bilinear, with antialiasing when the size is reduced. Equal to torchvision's ``Resize`` of a PIL image followed by
    ``ToTensor`` within one gray level (1/255): PIL rounds to gray levels, this does not.
    """
    planes = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    pixels = planes.to(torch.float32).div_(255)
    if pixels.shape[-2:] == (image_size, image_size):
        return pixels
    return functional.interpolate(pixels, size=(image_size, image_size), mode="bilinear", antialias=True)
