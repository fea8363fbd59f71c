"""Score maps: where in an image each class is recognized."""

import torch
from torch import Tensor, nn

from nin.config.schema import UserError
from nin.networks.normalize import Normalize
from nin.networks.sequential import list_layers

NO_MAPS = (
    "this network has no score maps: they need an nn.Sequential with one nn.Flatten after its last maps, which have a "
    "height and a width"
)


def find_map_kind(network: nn.Module) -> str | None:
    """How the logits follow from the last maps, if they are a linear function of them.

    Returns:
        "gap": they are the means of the maps. "fc": one fully connected layer follows the maps, or their means. None:
        neither, and `forward_with_maps` is not for this network.
    """
    layers = _layers(network)
    if len(layers) < 3 or any(isinstance(layer, nn.Flatten | nn.Linear) for layer in layers[:-2]):
        return None
    before, last = layers[-2:]
    if isinstance(last, nn.Flatten):
        return "gap" if _pools_to_one(before) else None
    return "fc" if isinstance(before, nn.Flatten) and isinstance(last, nn.Linear) else None


def _pools_to_one(layer: nn.Module) -> bool:
    """Whether ``layer`` is a global average pooling."""
    return isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))


def _layers(network: nn.Module) -> list[nn.Module]:
    """The layers of an ``nn.Sequential``, in their order; the network of a user's own is one layer that may be one."""
    if not isinstance(network, nn.Sequential):
        return []
    *before, last = list(network)
    return [*before, *list_layers(last)]


def forward_with_maps(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits and score maps of a network for which `find_map_kind` finds a kind.

    With global average pooling the last block has one map per class, and the logit is its mean (Lin et al. 2013,
    section 3.2). With a fully connected layer on the maps, or on their means, a class's score map is the sum of all
    maps, each weighted with the class's weights (class activation maps: Zhou et al. 2016, section 2), position by
    position if it has several; its mean and the layer's bias add up to the logit.

    Args:
        images: ``(batch, channels, size, size)``, float.

    Returns:
        Logits ``(batch, classes)`` and score maps ``(batch, classes, height, width)``; None if the features before the
        fully connected layer have no height and width, as those of a transformer.
    """
    maps = images
    *layers, before, last = _layers(network)  # a global average pooling and Flatten, or Flatten and Linear
    pooling = layers.pop() if isinstance(last, nn.Linear) and _pools_to_one(layers[-1]) else None
    for layer in layers:
        maps = layer(maps)
    logits = last(before(maps if pooling is None else pooling(maps)))
    if maps.ndim != 4:
        return logits, None
    if pooling is not None:
        maps = torch.einsum("bkhw,ck->bchw", maps, last.weight)
    elif isinstance(last, nn.Linear):
        height, width = maps.shape[-2:]
        weights = last.weight.view(last.out_features, -1, height, width)
        maps = torch.einsum("bkhw,ckhw->bchw", maps, weights) * (height * width)
    return logits, maps


def find_last_maps(network: nn.Module, images: Tensor) -> nn.Module | None:
    """The layer whose output are the last maps before the fully connected layers, for `grad_cam`.

    Args:
        images: ``(batch, channels, size, size)``, float; the first is used.

    Returns:
        None if the network is not a sequence with one `nn.Flatten` after maps, which have a height and a width. The
        images themselves are no maps.
    """
    layers = _layers(network)
    flattens = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Flatten)]
    if len(flattens) != 1:
        return None
    last = flattens[0] - 1
    if last < 0 or isinstance(layers[last], Normalize):
        return None
    if last and _pools_to_one(layers[last]):
        last -= 1
    with torch.no_grad():
        maps = nn.Sequential(*layers[: last + 1])(images[:1])
    return layers[last] if maps.ndim == 4 else None


def grad_cam(network: nn.Module, images: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) of the last maps before the fully connected layers, by captum.

    The gradient of each class's logit, averaged over the positions, weights the maps. The mean of a class's map is
    its first-order share of the logit: an approximation, since several layers follow.

    Args:
        images: ``(batch, channels, size, size)``, float.

    Returns:
        Maps ``(batch, classes, height, width)``.

    Raises:
        UserError: if captum is not installed, or `find_last_maps` finds none.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError:
        raise UserError("score maps of this network need captum: python3 -m pip install captum") from None
    layer = find_last_maps(network, images)
    if layer is None:
        raise UserError(NO_MAPS)
    with torch.no_grad():
        classes = network(images[:1]).shape[1]
    cam = LayerGradCam(network, layer)
    images = images.detach().requires_grad_()  # a network without gradients of its weights still has these
    maps = torch.cat([cam.attribute(images, target=i).detach() for i in range(classes)], dim=1)
    # captum weights each map by the mean of its gradients; by their sum the product's mean is the logit's share.
    return maps * (maps.shape[-2] * maps.shape[-1])
