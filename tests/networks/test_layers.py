"""The table of layers is compared with counts by hand, and its receptive fields with gradients."""

import pytest
import torch
from torch import Tensor, nn

from nin.config.composition import compose_config
from nin.config.networks import NETWORKS
from nin.config.validation import validate
from nin.networks.build import build_network
from nin.networks.layers import describe_layers, find_receptive_fields, first_fully_connected_weights
from nin.networks.nin import NiN
from nin.networks.sequential import list_layers


@pytest.mark.parametrize(
    ("model", "fully_connected", "parameters"),
    # Dive into Deep Learning's networks, with one input channel and ten classes.
    [
        ("lenet", 48_000, 61_706),
        ("alexnet", 26_214_400, 46_764_746),
        ("vgg", 102_760_448, 128_806_154),
        ("nin", 0, 1_992_166),
        ("mlp", 784 * 4096, 784 * 4096 + 4096 + 4096 * 10 + 10),
    ],
)
def test_the_networks_that_the_notebooks_compare(model: str, fully_connected: int, parameters: int) -> None:
    settings = validate(compose_config([f"model={model}"]))
    with torch.device("meta"):
        network = build_network(settings, in_channels=1, num_classes=10)
        assert network(torch.zeros(2, 1, settings.data.image_size, settings.data.image_size)).shape == (2, 10)
    assert first_fully_connected_weights(network) == fully_connected
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("model", sorted(NETWORKS))
def test_channels_and_classes_are_arguments(model: str) -> None:
    settings = validate(compose_config([f"model={model}"]))
    with torch.device("meta"):
        network = build_network(settings, in_channels=3, num_classes=7)
        images = torch.zeros(2, 3, settings.data.image_size, settings.data.image_size)
        assert network(images).shape == (2, 7)


def test_lenets_multiply_adds_by_hand() -> None:
    settings = validate(compose_config(["model=lenet"]))
    with torch.device("meta"):
        network = build_network(settings, in_channels=1, num_classes=10)
        rows = describe_layers(network, in_channels=1, image_size=28)
    convolutions = [28 * 28 * 6 * 25, 10 * 10 * 16 * 6 * 25]
    connected = [400 * 120, 120 * 84, 84 * 10]
    assert [row.multiply_adds for row in rows if row.multiply_adds] == convolutions + connected
    assert find_receptive_fields(network, 28)[-1] == 28


def test_shapes_parameters_and_counts_of_the_notebooks_network() -> None:
    with torch.device("meta"):
        network = NiN()
        rows = describe_layers(network, in_channels=1, image_size=224)
    assert [row.output_shape for row in rows] == [
        (96, 54, 54), (96, 26, 26), (256, 26, 26), (256, 12, 12), (384, 12, 12), (384, 5, 5), (384, 5, 5),
        (10, 5, 5), (10, 1, 1), (10,),
    ]  # fmt: skip
    assert sum(row.parameters for row in rows) == 1_992_166
    assert rows[0].multiply_adds == 54 * 54 * 96 * (11 * 11 + 96 + 96)
    assert find_receptive_fields(network, 224) == [11, 19, 51, 67, 99, 131, 131, 195, 219, 219]


def test_a_sequence_with_a_forward_of_its_own_is_one_layer() -> None:
    class Repeated(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.repeat(1, 3, 1, 1)).mean((2, 3))

    (row,) = describe_layers(nn.Sequential(Repeated(nn.Conv2d(3, 4, 3))), in_channels=1, image_size=8)
    assert (row.name, row.output_shape, row.multiply_adds) == ("Repeated", (4,), 6 * 6 * 4 * 3 * 9)


def test_attention_and_recurrence_by_hand() -> None:
    class Recurrent(nn.LSTM):
        def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(tokens)[0]

    attention = nn.TransformerEncoderLayer(28, 2, dim_feedforward=16, batch_first=True)
    # An image of 28x28 as 28 tokens of 28 features.
    network = nn.Sequential(nn.Flatten(1, 2), attention, Recurrent(28, 4, batch_first=True))
    counts = [layer.multiply_adds for layer in describe_layers(network, in_channels=1, image_size=28)]
    projections, products, hidden = 28 * 28 * (3 * 28 + 28), 2 * 28 * 28 * 28, 2 * 28 * 28 * 16
    assert counts == [0, projections + products + hidden, 28 * 4 * 4 * (28 + 4)]  # of an LSTM, four gates
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.set_flags(_fp32_precision=None)[0]  # is enabled


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.twice = nn.Conv2d(4, 4, 1, bias=False)
        self.unused = nn.Linear(3, 3)
        self.classes = nn.Linear(4, 10)
        self.same = nn.ModuleList([self.classes, nn.Linear(10, 10)])
        self.same[1].bias = self.classes.bias
        self.mixed = nn.Parameter(torch.eye(10))

    def forward(self, images: Tensor) -> Tensor:
        return self.same[1](self.classes(self.twice(self.twice(self.stem(images))).mean((2, 3))) @ self.mixed)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Own()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


class Uncalled(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * self.net.mixed[0, 0]


class Inner(nn.Module):
    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.convolution, self.classes = convolution, nn.Linear(2, 3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.convolution(images).mean((2, 3)))


class Nested(nn.Module):
    """Has a part that is also within another one."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 1, bias=False)
        self.inner = Inner(self.convolution)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)


def test_the_parts_of_a_network_of_ones_own_by_hand() -> None:
    def rows(network: nn.Module) -> list[tuple[object, ...]]:
        layers = describe_layers(nn.Sequential(nn.Identity(), network), in_channels=1, image_size=8, is_own=True)
        return [(row.name, row.output_shape, row.parameters, row.multiply_adds) for row in layers][1:]

    expected = [
        ("stem.0: Conv2d", (4, 8, 8), 40, 8 * 8 * 4 * 9),
        ("stem.1: ReLU", (4, 8, 8), 0, 0),
        ("twice: Conv2d", (4, 8, 8), 16, 2 * 8 * 8 * 4 * 4),
        ("unused: Linear", (), 12, 0),
        ("classes: Linear", (10,), 50, 40),
        ("same.1: Linear", (10,), 100, 100),  # its bias is that of classes
        ("Own without these", (10,), 100, 100),
    ]
    assert rows(Own()) == expected
    *parts, last = rows(Wrapped())
    assert parts == [(f"net.{name}", *values) for name, *values in expected[:-1]]
    assert last == ("Wrapped without these", *expected[-1][1:])
    assert rows(Uncalled()) == [("Uncalled", (64,), 318, 0)]
    assert rows(Nested()) == [
        ("convolution: Conv2d", (2, 8, 8), 2, 0),
        ("inner: Inner", (3,), 6, 8 * 8 * 2 + 6),
    ]


def test_a_layer_that_occurs_twice_is_listed_twice() -> None:
    relu, convolution = nn.ReLU(), nn.Conv2d(1, 1, 3)
    assert list_layers(nn.Sequential(relu, convolution, relu)) == [relu, convolution, relu]


@pytest.mark.parametrize(
    ("network", "image_size", "expected"),
    [
        (NiN(widths=[1, 1, 1], num_classes=1), 224, 219),
        (NiN(widths=[1, 1, 1], num_classes=1, first_padding=1), 224, 218),
        (NiN(widths=[1, 1, 1], num_classes=1), 67, 67),
        # The last pixel is in no window, and two of five are between the windows.
        (nn.Sequential(nn.Conv2d(1, 1, 3, stride=5)), 14, 3),
        (nn.Sequential(nn.Conv2d(1, 1, 3, stride=5), nn.AvgPool2d(2)), 14, 8),
        # Padding is not counted: of 7 pixels at most 3 are in a window at the border of a 3x3 image.
        (nn.Sequential(nn.Conv2d(1, 1, 7, padding=3)), 3, 3),
    ],
    ids=["nin", "first_padding", "67", "stride", "gaps", "padding"],
)
def test_receptive_fields_are_those_of_the_gradient(network: nn.Sequential, image_size: int, expected: int) -> None:
    network.double().eval()
    for module in network.modules():  # every weight 1: no path to the input cancels another or is inactive
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
    for i, layer in enumerate(network):
        if isinstance(layer, nn.MaxPool2d):  # its gradient reaches only the largest value of a window
            network[i] = nn.AvgPool2d(layer.kernel_size, layer.stride)
    fields = find_receptive_fields(network, image_size)
    assert fields[-1] == expected
    image = torch.ones(1, 1, image_size, image_size, dtype=torch.float64, requires_grad=True)
    x = image
    for layer, field in zip(network, fields, strict=True):
        x = layer(x)
        # The rows of pixels with a gradient, for each output position along the diagonal.
        outputs = [x[0, 0, i, i] for i in range(x.shape[-1])] if x.ndim == 4 else [x[0, 0]]
        extents = []
        for output in outputs:
            (gradient,) = torch.autograd.grad(output, image, retain_graph=True)
            (reached,) = gradient[0, 0].any(1).nonzero(as_tuple=True)
            extents.append(int(reached[-1] - reached[0]) + 1)
        assert field == max(extents)
