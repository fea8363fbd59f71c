"""The same function of the same weights, computed faster: nothing here changes a result by more than rounding."""

import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from nin.config.networks import OwnModel
from nin.config.schema import Settings

log = logging.getLogger(__name__)

# A micro-batch's largest feature maps are at most this many bytes, so that the next layer finds them in a CPU's cache.
_CACHE_BYTES = 18 * 2**20
# Their statistics are those of the full batch.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def optimize(network: nn.Sequential, settings: Settings, in_channels: int) -> "tuple[int | None, list[Dropout]]":
    """Applies ``settings.speed`` to ``network``, in place.

    Args:
        in_channels: number of channels of the images.

    Returns:
        The number of images per micro-batch on a CPU, None for full batches; and the dropout layers, whose `begin` is
        to be called before each batch.
    """
    options = settings.speed
    # torch computes wrong gradients of such maps on Apple's GPUs, or ends the process (issues 175189 and 175190).
    on_mps = torch.backends.mps.is_available() and settings.trainer.accelerator in ("auto", "gpu", "mps")
    if options.channels_last and not on_mps:
        # `network.to` fails on tensors of rank 5, which a network of the user's own may have.
        for tensor in itertools.chain(network.parameters(), network.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.to(memory_format=torch.channels_last)
    if isinstance(settings.model, OwnModel):
        # Of the user's own module it is not known whether a batch may be split, and where its dropout and ReLUs are.
        if not isinstance(options.micro_batch, int):
            log.info("speed: of a network of your own, batches are not split unless speed.micro_batch is a number")
            return None, []
        if _has_batch_norm(network):
            log.warning(
                "speed.micro_batch is ignored: the network has batch norm, whose statistics are of a full batch"
            )
            return None, []
        return options.micro_batch, []
    shapes = output_shapes(network, in_channels, settings.data.image_size)
    micro_batch = micro_batch_size(network, shapes)
    if micro_batch and options.micro_batch != "auto":
        micro_batch = options.micro_batch
    elif settings.loss:  # the mean over a batch may be another than that over its parts, as with weights of classes
        micro_batch = None
    dropouts = replace_dropout(network, shapes)
    if options.relu_after_pooling:
        move_relu_after_pooling(network)
    return micro_batch, dropouts


def output_shapes(network: nn.Sequential, in_channels: int, image_size: int) -> list[torch.Size]:
    """The shape of each layer's output without the batch dimension, found by a forward pass on the "meta" device."""
    # Two images: batch norm in training mode does not take a single 1x1 map.
    x, shapes = torch.empty(2, in_channels, image_size, image_size, device="meta"), []
    with torch.no_grad():
        for layer in network:
            state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
            x = functional_call(layer, {name: tensor.to("meta") for name, tensor in state.items()}, (x,))
            shapes.append(x.shape[1:])
    return shapes


def micro_batch_size(network: nn.Sequential, shapes: list[torch.Size]) -> int | None:
    """The number of images per micro-batch that is fastest on a CPU, or None if batches must not be split.

    Args:
        shapes: of the network's layers, from ``output_shapes``.
    """
    if _has_batch_norm(network):
        return None
    largest = max(4 * shape.numel() for shape in shapes)
    return max(1, _CACHE_BYTES // largest)


def _has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, BATCH_NORMS) for module in network.modules())


def replace_dropout(network: nn.Sequential, shapes: list[torch.Size]) -> "list[Dropout]":
    """Replaces each ``nn.Dropout`` that zeroes values with ``Dropout``, in place, and returns the new layers.

    Args:
        shapes: of the network's layers, from ``output_shapes``.
    """
    for i, (layer, shape) in enumerate(zip(network, shapes, strict=True)):
        if type(layer) is nn.Dropout and layer.p > 0:
            network[i] = Dropout(layer.p, shape)
    return [layer for layer in network if isinstance(layer, Dropout)]


class Dropout(nn.Dropout):
    """Dropout that draws one mask per batch, so that splitting into micro-batches does not change it.

    The mask is drawn outside of the network, in torch's default memory format: compilation and channels_last do not
    change it either.

    Args:
        p: probability of zeroing a value.
        shape: of one image's feature maps, ``(channels, height, width)`` or ``(features,)``.
    """

    def __init__(self, p: float, shape: Sequence[int]):
        super().__init__(p)
        self.shape = tuple(shape)
        self.mask: Tensor | None = None
        self.done = 0
        self._memory = torch.empty(0)

    def begin(self, batch_size: int, device: torch.device) -> None:
        """Draws the mask of the next ``batch_size`` images. Without it every call draws its own, as ``nn.Dropout``.

        All masks are in the same memory: CUDA graphs, which contain its address, would be recorded again for another.
        """
        if len(self._memory) < batch_size or self._memory.device != device:
            self._memory = torch.empty(batch_size, *self.shape, device=device)
        self.mask = functional.dropout(self._memory[:batch_size].fill_(1), self.p, inplace=True)
        self.done = 0

    def forward(self, micro_batch: Tensor) -> Tensor:
        if not self.training or self.mask is None:
            return super().forward(micro_batch)
        start, self.done = self.done, self.done + len(micro_batch)
        return micro_batch * self.mask[start : self.done].to(micro_batch.dtype)


def move_relu_after_pooling(network: nn.Sequential) -> None:
    """Moves each ReLU that is followed by max pooling after it, in place. Parameter names do not change.

    The values and gradients are the same, and ReLU has a quarter of the values to compute.
    """
    layers = list(network)
    for i, layer in enumerate(layers):
        if not isinstance(layer, nn.MaxPool2d) or i == 0:
            continue
        previous = layers[i - 1]
        before, last = (previous, -1) if isinstance(previous, nn.Sequential) else (network, i - 1)
        if isinstance(list(before)[last], nn.ReLU):
            before[last] = nn.Identity()
            network[i] = nn.Sequential(layer, nn.ReLU(inplace=True))
