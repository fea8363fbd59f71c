"""The table of a network's layers: shapes, parameters, multiply-adds and receptive fields, counted from its modules."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nin.networks.sequential import list_layers


@dataclass(frozen=True)
class Layer:
    """One row of the table.

    Attributes:
        name: of the layer's class, after its place in a network of the user's own.
        output_shape: without the batch dimension; empty if the layer was not called, or returned no tensor.
        parameters: their number.
        multiply_adds: per image; biases are not counted.
    """

    name: str
    output_shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def describe_layers(network: nn.Sequential, in_channels: int, image_size: int, is_own: bool = False) -> list[Layer]:
    """Returns one row for each layer of ``network``, in order. The network may be on the "meta" device.

    Args:
        is_own: whether the last layer is a network of the user's own, which has rows for its parts.
    """
    device = next(network.parameters(), torch.empty(0)).device  # a network of the user's own may have none
    x = torch.empty(1, in_channels, image_size, image_size, device=device)
    rows = []
    was_training = network.training
    network.eval()
    with torch.no_grad(), countable_operators():
        for layer in network:
            with FlopCounterMode(display=False) as counter:
                inputs, x = x, layer(x)
            multiply_adds = counter.get_total_flops() // 2
            parameters = sum(p.numel() for p in layer.parameters())
            rows.append(Layer(type(layer).__name__, tuple(x.shape[1:]), parameters, multiply_adds))
        if is_own:
            rows[-1:] = _divide(rows[-1], network[-1], inputs)
    network.train(was_training)
    return rows


@contextmanager
def countable_operators() -> Iterator[None]:
    """Lets torch compute attention and LSTMs by operators that ``FlopCounterMode`` knows, and not by fused ones."""
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    had_mkldnn, *_ = torch.backends.mkldnn.set_flags(False, _fp32_precision=None)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mkldnn.set_flags(had_mkldnn, _fp32_precision=None)
        torch.backends.mha.set_fastpath_enabled(was_fast)


def _divide(whole: Layer, network: nn.Module, images: Tensor) -> list[Layer]:
    """The rows of the parts of a network of the user's own, and of what is in none of them; ``whole`` if it has none.

    A part that is called several times has the sum of its multiply-adds and its last output shape.
    """
    names: dict[nn.Module, str] = {}
    for name, part in _list_parts(network):
        names.setdefault(part, name)  # a part may have several names
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    flops = Counter[nn.Module]()

    calls: list[nn.Module] = []  # those that are under way: what a part calls in it counts for the outermost one

    def begin(part: nn.Module, _: Any) -> None:
        if not calls:
            flops[part] -= counter.get_total_flops()
        calls.append(part)

    def end(part: nn.Module, _: Any, output: Any) -> None:
        calls.pop()
        if not calls:
            flops[part] += counter.get_total_flops()
        shapes[part] = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()

    with ExitStack() as hooks, FlopCounterMode(display=False) as counter:
        for part in names:
            hooks.enter_context(part.register_forward_pre_hook(begin))
            hooks.enter_context(part.register_forward_hook(end))
        network(images)
    if not shapes:  # as of a network that calls none of its modules
        return [whole]
    rows, counted = [], set[nn.Parameter]()
    for part, name in names.items():
        weights = set(part.parameters()) - counted  # parts may share weights
        counted |= weights
        parameters = sum(p.numel() for p in weights)
        rows.append(Layer(f"{name}: {type(part).__name__}", shapes.get(part, ()), parameters, flops[part] // 2))
    parameters = whole.parameters - sum(row.parameters for row in rows)
    multiply_adds = whole.multiply_adds - sum(row.multiply_adds for row in rows)
    if parameters or multiply_adds:
        rows.append(Layer(f"{whole.name} without these", whole.output_shape, parameters, multiply_adds))
    return rows


def _list_parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a network with their names: its modules, and in place of a sequence or a list of modules its own.

    Of a class that only holds another network, those of that network.
    """
    children = list(network.named_children())
    for name, child in children:
        is_container = isinstance(child, nn.ModuleList | nn.ModuleDict) or list_layers(child) != [child]
        if (is_container or len(children) == 1) and any(True for _ in child.children()):
            yield from ((f"{name}.{inner}", part) for inner, part in _list_parts(child))
        else:
            yield name, child


def find_receptive_fields(network: nn.Sequential, image_size: int) -> list[int]:
    """Pixels per side of the receptive field after each layer of one of the project's networks.

    That is the smallest square of the input that contains every pixel on which one output value can depend; of the
    output value for which it is largest. Padding is not counted, nor are pixels at the right and bottom border that no
    window of a strided layer reaches. The windows of these networks are square and without dilation, and their padding
    is a number; a network of the user's own may have any others.
    """
    fields, extents = [], [(i, i) for i in range(image_size)]
    for layer in network:
        for part in list_layers(layer):
            extents = _extents_after(part, extents)
        fields.append(max(0, *(last - first + 1 for first, last in extents)))
    return fields


def _extents_after(layer: nn.Module, extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first and the last input pixel on which each output position of ``layer`` can depend, along one dimension.

    Args:
        extents: the same for the positions of the layer's input.
    """
    if isinstance(layer, nn.AdaptiveAvgPool2d | nn.Linear):  # each output value depends on all positions
        return [_union(extents)]
    if not isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return extents
    kernel, stride, padding = (
        v if isinstance(v, int) else int(v[0]) for v in (layer.kernel_size, layer.stride, layer.padding)
    )
    positions = range((len(extents) + 2 * padding - kernel) // stride + 1)
    starts = [i * stride - padding for i in positions]
    return [_union(extents[max(start, 0) : max(start + kernel, 0)]) for start in starts]


def _union(extents: list[tuple[int, int]]) -> tuple[int, int]:
    if not extents:  # a window in the padding
        return (0, -1)
    return min(first for first, _ in extents), max(last for _, last in extents)


def first_fully_connected_weights(network: nn.Module) -> int:
    """The number of weights, without biases, of the first fully connected layer; 0 if there is none."""
    return next((m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear)), 0)
