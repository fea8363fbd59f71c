"""Augmentation, resizing and scaling of batches of images on the training device."""

import torch
from torch import Tensor
from torch.nn import functional


def augment(images: Tensor, augment: str) -> Tensor:
    """Applies random changes to every image, with random numbers from torch's global generator.

    Args:
        images: ``(batch, height, width)``, any type.
        augment: "none", "flip" (horizontally, with probability 0.5) or "flip_shift" (also shifts by up to 2 pixels in
            each direction, padded with zeros).
    """
    if augment == "none":
        return images
    flip = torch.rand(len(images), 1, 1, device=images.device) < 0.5
    images = torch.where(flip, images.flip(-1), images)
    if augment == "flip":
        return images
    batch, height, width = images.shape
    rows, columns = torch.randint(0, 5, (2, batch, 1), device=images.device)
    padded = functional.pad(images, (2, 2, 2, 2))
    rows = rows + torch.arange(height, device=images.device)  # (batch, height)
    columns = columns + torch.arange(width, device=images.device)  # (batch, width)
    each = torch.arange(batch, device=images.device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]]


def resize(images: Tensor, image_size: int) -> Tensor:
    """Converts ``(batch, height, width)`` uint8 to ``(batch, 1, image_size, image_size)`` float32 from 0 to 1.

    Bilinear, with antialiasing when the size is reduced. Equal to torchvision's ``Resize`` of a PIL image followed by
    ``ToTensor`` within one gray level (1/255): PIL rounds to gray levels, this does not.
    """
    pixels = images.unsqueeze(1).to(torch.float32).div_(255)
    if pixels.shape[-2:] == (image_size, image_size):
        return pixels
    return functional.interpolate(pixels, size=(image_size, image_size), mode="bilinear", antialias=True)
