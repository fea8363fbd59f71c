"""Initialization of the first convolution from training images (``model.init=kaiming_dirac_pca``)."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def start_from_components(network: nn.Module, images: Tensor) -> None:
    """Sets the filters of the first convolution to the principal components of the images' patches, in place.

    The component with the largest variance comes first, and each is followed by its negative: after a ReLU one of the
    two is positive. Each filter has the norm √2, which is the root mean square norm of the filters that
    ``kaiming_normal`` draws. If the convolution has a bias, it is set so that the mean output over the patches is zero.
    Filters for which there is no component keep their weights.

    In airbench (Jordan 2024, section 3.2) the components are also scaled to equal variance, and are not trained.

    Args:
        images: float ``(batch, channels, height, width)``, as the convolution gets them. The patches lie within an
            image: padding is not part of them.
    """
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    mean, components = principal_components(images, first.kernel_size, first.stride)
    filters = 2**0.5 * torch.stack([components, -components], 1).flatten(0, 1)[: first.out_channels]
    with torch.no_grad():
        first.weight[: len(filters)] = filters.view(-1, *first.weight.shape[1:]).to(first.weight.dtype)
        if first.bias is not None:
            first.bias[: len(filters)] = -(filters @ mean).to(first.bias.dtype)


def principal_components(
    images: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Mean ``(values,)`` and principal components ``(components, values)`` of patches, one row each, in float64.

    Components with less than 1e-4 of the largest variance are left out: patches of enlarged images have few that
    differ. The components have length 1. In each, the value with the largest magnitude is positive: the solver's signs
    are arbitrary.
    """
    total, products, count = torch.zeros(()), torch.zeros(()), 0
    for image in images.split(1):  # all patches of all images would fill the memory
        patches = functional.unfold(image.double(), kernel_size, stride=stride)[0].T
        total, products, count = total + patches.sum(0), products + patches.T @ patches, count + len(patches)
    mean = total / count
    variances, vectors = torch.linalg.eigh(products / count - mean.outer(mean))  # the smallest first
    components = vectors.T[variances > 1e-4 * variances[-1]].flip(0)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return mean, components * largest.sign()
