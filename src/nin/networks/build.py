"""Builds a network by its name and initializes its weights."""

import bisect
import importlib
import logging
import warnings
from collections import OrderedDict
from typing import get_args

import torch
from torch import nn

from nin.config import own_classes
from nin.config.errors import locate_in_own_code, read_first_line
from nin.config.networks import NETWORKS, Model, OwnModel
from nin.config.schema import OwnData, Settings, UserError
from nin.config.types import Init
from nin.networks.normalize import Normalize
from nin.networks.score_maps import find_map_kind
from nin.networks.sequential import Network

log = logging.getLogger(__name__)

_LARGEST = 1024  # pixels per side; the maximum of data.image_size


def require_buildable(settings: Settings) -> None:
    """Checks that the network can be built and that every layer has an output, without computing anything.

    Of a network of the user's own, only whether its class can be imported and takes the arguments of these names; all
    else depends on its data.

    Raises:
        UserError: names arguments of the network that don't fit each other, or the smallest size of images.
    """
    model, size = settings.model, settings.data.image_size
    if isinstance(model, OwnModel):
        own_classes.import_class("model", model, nn.Module)
        return
    if model.init == "kaiming_dirac_pca" and isinstance(settings.data, OwnData):
        raise UserError(
            f"model.init=kaiming_dirac_pca: needs the training images of data=fashion_mnist, folder or another data "
            f"set of the project, not those of {settings.data.target}; choose model.init=kaiming_dirac"
        )
    if _accepts(model, size):
        return
    if not _accepts(model, _LARGEST):
        raise UserError(
            f"model: {model.name} needs images of more than {_LARGEST} pixels per side, which is the maximum"
        )
    smallest = bisect.bisect_left(range(_LARGEST), True, lo=size + 1, key=lambda pixels: _accepts(model, pixels))
    small = ", or model=nin_small, which is made for 28" if size >= 28 else ""
    raise UserError(
        f"data.image_size={size}: {model.name} needs at least {smallest} pixels per side; choose data.image_size="
        f"{smallest} or more{small}"
    )


def _accepts(model: Model, image_size: int) -> bool:
    """Whether the network maps images of this size to logits, found on the "meta" device, where tensors have no values.

    Raises:
        UserError: if the constructor refuses its arguments.
    """
    # Warnings are about layers without weights.
    with torch.device("meta"), torch.no_grad(), warnings.catch_warnings(action="ignore"):
        try:
            network = _construct(model, image_size, in_channels=1, num_classes=10).eval()
            return network(torch.empty(1, 1, image_size, image_size)).shape == (1, 10)
        except RuntimeError:  # a layer whose output would be empty
            return False


def _construct(model: Model, image_size: int, in_channels: int, num_classes: int) -> nn.Sequential:
    """A network of the project: the class in ``networks/<name>.py`` from whose signature the section was read."""
    module = importlib.import_module(f"nin.networks.{model.name}")
    arguments = model.model_dump(exclude={"name", "input_size", "init"})
    try:
        network = getattr(module, NETWORKS[model.name].__name__)(
            in_channels=in_channels, num_classes=num_classes, image_size=image_size, **arguments
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    if model.init == "kaiming_dirac_pca":
        _require_patches(network, model.name, image_size)
    return network


def _require_patches(network: nn.Module, name: str, image_size: int) -> None:
    first = next((layer for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is None:
        raise UserError(f"model.init=kaiming_dirac_pca: {name} has no convolution; choose kaiming_dirac")
    if max(first.kernel_size) > image_size:  # valid with padding, which is no part of the images
        raise UserError(
            f"model.init=kaiming_dirac_pca: the first convolution of {max(first.kernel_size)}x{max(first.kernel_size)} "
            f"is larger than the images of {image_size}x{image_size}; choose kaiming_dirac"
        )


def build_network(settings: Settings, in_channels: int, num_classes: int) -> nn.Sequential:
    """Builds the network that ``settings.model`` names, for images of ``settings.data.image_size``.

    Args:
        in_channels: number of channels in the input images.
        num_classes: number of logits in the output.

    Raises:
        UserError: if its arguments don't fit each other. `require_buildable` finds images that are too small for it.
    """
    model, size = settings.model, settings.data.image_size
    if isinstance(model, OwnModel):
        network = _build_own(model, size, in_channels, num_classes)
    else:
        network = _construct(model, size, in_channels, num_classes)
        initialize(network, model.init)
    if not settings.data.normalize:
        return network
    # The other layers keep their names.
    return Network(OrderedDict([("normalize", Normalize(in_channels)), *network.named_children()]))


def _build_own(model: OwnModel, image_size: int, in_channels: int, num_classes: int) -> nn.Sequential:
    """A network of the user's own, as the only layer of an ``nn.Sequential``.

    What its constructor puts in eval mode, as the batch norm of a frozen backbone, stays in it.

    Raises:
        UserError: if it can't be built, does not map a batch of images, or a single one, to logits, or has a state
            that no checkpoint can hold.
    """
    shape = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
    network = own_classes.build("model", model, nn.Module, **shape)
    frozen = [part for part in network.modules() if not part.training]
    network.eval()
    for count in (2, 1):
        _require_logits(network, model.target, (count, in_channels, image_size, image_size), num_classes)
    for key, value in network.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise UserError(
                f"model: {model.target}: state_dict() has a {type(value).__name__} at {key}; checkpoints hold tensors "
                "only: let get_extra_state() return one, or keep the value in a buffer"
            )
    network.train()  # a class may override it, to keep a part in eval mode
    for part in frozen:
        part.training = False
    return Network(OrderedDict([("own", network)]))


def _require_logits(network: nn.Module, target: str, size: tuple[int, ...], num_classes: int) -> None:
    first = next(network.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            logits = network(torch.zeros(size, device=first.device))
    except UserError:  # raised by this package, which the class calls
        raise
    except Exception as error:  # raised by the user's own class
        reason = f"{read_first_line(error)}{locate_in_own_code(error)}"
        # torch raises these where the sizes of tensors and windows don't fit.
        is_about_size = isinstance(error, RuntimeError | ValueError) and not isinstance(error, NotImplementedError)
        hint = "; if the images are too small for it, choose a larger data.image_size" if is_about_size else ""
        raise UserError(f"model: {target} fails on images {size}: {reason}{hint}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (size[0], num_classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f"model: {target} maps images {size} to {found}, and not to logits {(size[0], num_classes)}")


def require_complete_state(network: nn.Module, settings: Settings, in_channels: int, num_classes: int) -> None:
    """Checks that a network of the user's own, built twice with other random numbers, is the same with one state_dict.

    It is not if layers are in a list, or tensors are attributes: a checkpoint would lack them. Warns of a network that
    ends with a softmax.

    Args:
        network: as `build_network` returns it, with the same arguments.

    Raises:
        UserError: if the logits differ or have no gradient, or the state can't be loaded.
    """
    if not isinstance(settings.model, OwnModel):
        return
    state, size = network.state_dict(), settings.data.image_size
    device = next(network.parameters(), torch.empty(0)).device
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # Other values than the initial ones, which may hide what is missing: a last layer often starts at zero.
        torch.manual_seed(settings.seed)
        for name, weights in network.named_parameters(remove_duplicate=False):
            if name in state and weights.is_floating_point():
                state[name] = weights + 0.02 * torch.randn_like(weights)
        images = torch.rand(2, in_channels, size, size, device=device)
        logits = []
        for seed in (settings.seed + 1, settings.seed + 2):
            torch.manual_seed(seed)
            copy = build_network(settings, in_channels, num_classes)
            try:
                copy.load_state_dict(state)
            except RuntimeError as error:
                reason = read_first_line(error)
                raise UserError(
                    f"model: {settings.model.target}: its state_dict() can't be loaded again: {reason}"
                ) from error
            copy.to(device).eval()
            logits.append([copy(images.clone()) for _ in range(2)])
        with torch.enable_grad():
            is_trained = copy(images.clone()).requires_grad
    (first, again), (other, _) = logits
    # A network may draw random numbers in eval mode, too.
    if torch.equal(first, again) and not torch.allclose(other, first, rtol=1e-2, atol=1e-3, equal_nan=True):
        raise UserError(
            f"model: {settings.model.target}: built again and given its state_dict(), it has other logits, as every "
            "use of a checkpoint would: layers in a list must be in nn.ModuleList, and tensors be registered with "
            "register_buffer() or as nn.Parameter"
        )
    if not is_trained and any(weights.requires_grad for weights in network.parameters()):
        raise UserError(
            f"model: {settings.model.target}: its logits have no gradient, so that nothing could be trained: leave out "
            ".detach(), .data and torch.no_grad() in its forward()"
        )
    if (first >= 0).all() and torch.allclose(first.sum(1), first.new_ones(len(first)), atol=1e-3):
        log.warning(
            "model: %s ends with a softmax, as the sum of its outputs is 1 for each image; it would train better "
            "without, because the loss and nin predict apply a softmax to what the network returns",
            settings.model.target,
        )


def initialize(network: nn.Module, init: str) -> None:
    """Initializes the weights of every convolution and fully connected layer, in place.

    * "xavier_uniform" (Glorot & Bengio 2010), used by the notebooks: weights only, biases as torch initializes them.
    * "kaiming_normal" (He et al. 2015), for layers followed by ReLU: biases are zero.
    * "kaiming_dirac": as "kaiming_normal", with changes with which a deep NiN trains for every seed. 1x1
      convolutions with as many outputs as inputs start as the identity. In the block that ends in one map per class,
      the last convolution that is drawn at random gets 0.3 times the weights and biases of one, so that the ReLU on
      the score maps is positive for every class and image. A fully connected layer on the score maps starts as their
      average: with random weights its first gradients are large, and drive all maps below zero.
    * "kaiming_dirac_pca": as "kaiming_dirac"; training then starts with the principal components of the training
      images' patches as the first filters (`components`).
    * "torch": as torch initializes them.

    Raises:
        ValueError: if ``init`` is none of these.
    """
    if init not in get_args(Init):
        raise ValueError(f"init={init!r}: must be one of {', '.join(get_args(Init))}")
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    if init == "xavier_uniform":
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
    elif init != "torch":
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if init in ("kaiming_dirac", "kaiming_dirac_pca"):
        for layer in filter(_keeps_channels, layers):
            nn.init.dirac_(layer.weight)
        if find_map_kind(network):
            *_, score_maps, _, last = network.children()
            _init_near_one(score_maps)
            _init_as_average(last)


def _init_near_one(score_maps: nn.Module) -> None:
    drawn = [layer for layer in score_maps.modules() if isinstance(layer, nn.Conv2d) and not _keeps_channels(layer)]
    for layer in drawn[-1:]:  # there is none if all of them start as the identity
        layer.weight.data *= 0.3
        if layer.bias is not None:
            nn.init.ones_(layer.bias)


def _init_as_average(layer: nn.Module) -> None:
    """Makes a fully connected layer on score maps compute the mean of each class's map."""
    if isinstance(layer, nn.Linear):
        pixels = layer.in_features // layer.out_features
        with torch.no_grad():
            layer.weight.copy_(torch.eye(layer.out_features).repeat_interleave(pixels, dim=1) / pixels)


def _keeps_channels(layer: nn.Module) -> bool:
    """Whether ``layer`` is a 1x1 convolution with as many outputs as inputs, which can be the identity."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.in_channels == layer.out_channels


def counting_device(model: Model | OwnModel) -> torch.device:
    """Returns the device on which a network is built if only its layers and operations are counted."""
    # A class of the user's own may read values of tensors, which do not exist on the "meta" device.
    return torch.device("cpu" if isinstance(model, OwnModel) else "meta")
