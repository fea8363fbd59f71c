"""Starting weights of the first convolution from training images (``model.init=kaiming_dirac_pca``)."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def start_from_components(network: nn.Module, images: Tensor) -> None:
    """Sets the filters of the first convolution to the principal components of the images' patches, in place.

    The component with the largest variance comes first, and each is followed by its negative: after a ReLU one of the
    two is positive. The norm of a filter is the root mean square of that of ``kaiming_normal``, the square root of 2. A
    bias makes the mean output zero. Filters in excess of twice the number of components keep their weights.

    In airbench (Jordan 2024, section 3.2) the components are also scaled to equal variance, and stay as they are.

    Args:
        images: float ``(batch, channels, height, width)``, as the convolution gets them.
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
    """Mean ``(values,)`` and principal components ``(values, values)`` of patches, one row each, in float64.

    The components have length 1, and their largest value by amount is positive: the solver's signs are arbitrary.
    """
    total, products, count = torch.zeros(()), torch.zeros(()), 0
    for image in images.split(1):  # all patches of all images would fill the memory
        patches = functional.unfold(image.double(), kernel_size, stride=stride)[0].T
        total, products, count = total + patches.sum(0), products + patches.T @ patches, count + len(patches)
    mean = total / count
    _, vectors = torch.linalg.eigh(products / count - mean.outer(mean))
    components = vectors.T.flip(0)  # by variance, the largest first
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return mean, components * largest.sign()
