from itertools import pairwise

import pytest
import torch
from torch import nn

from nin.config.composition import compose_settings
from nin.networks.alexnet import AlexNet
from nin.networks.build import build_network, initialize
from nin.networks.nin import NiN, NiNBlock


def notebooks_block(cin: int, cout: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cout, kernel, stride, padding), nn.ReLU(),
        nn.Conv2d(cout, cout, kernel_size=1), nn.ReLU(),
        nn.Conv2d(cout, cout, kernel_size=1), nn.ReLU(),
    )  # fmt: skip


def notebooks_network(first_padding: int) -> nn.Sequential:
    return nn.Sequential(
        notebooks_block(1, 96, 11, 4, first_padding), nn.MaxPool2d(3, stride=2),
        notebooks_block(96, 256, 5, 1, 2), nn.MaxPool2d(3, stride=2),
        notebooks_block(256, 384, 3, 1, 1), nn.MaxPool2d(3, stride=2), nn.Dropout(0.5),
        notebooks_block(384, 10, 3, 1, 1), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
    )  # fmt: skip


@pytest.mark.parametrize("first_padding", [0, 1])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_notebooks_weights_give_the_notebooks_logits(first_padding: int, train: bool) -> None:
    theirs, ours = notebooks_network(first_padding).train(train), NiN(first_padding=first_padding).train(train)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(other)
        images = torch.rand(2, 1, 224, 224)
        torch.manual_seed(0)
        expected = theirs(images)
        torch.manual_seed(0)
        assert (ours(images) - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0


def test_a_block_by_hand() -> None:
    block = NiNBlock(1, [1, 1], kernel_size=2, stride=1, padding=0)
    with torch.no_grad():
        for parameter, value in zip(block.parameters(), (1.0, -5.0, 2.0, 3.0), strict=True):
            parameter.fill_(value)
    image = torch.tensor([[[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]])
    # The 2x2 sums are 8 and 12; less 5, 3 and 7; twice that and 3 more.
    assert block(image).tolist() == [[[[9.0, 17.0]]]]


@pytest.mark.parametrize(("layers", "convolutions"), [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_conv1x1_layers_counts_the_1x1_convolutions(layers: int, convolutions: int) -> None:
    kernels = [m.kernel_size for m in NiN(conv1x1_layers=layers)[0] if isinstance(m, nn.Conv2d)]
    assert kernels == [(11, 11)] + [(1, 1)] * (convolutions - 1)


def test_the_papers_network() -> None:
    with torch.device("meta"):
        network = NiN(
            widths=[[192, 160, 96], 192], last_width=192, kernel_sizes=[5, 5, 3], first_stride=1, first_padding=2,
            dropout_between=True,
        )  # fmt: skip
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.kernel_size[0], m.out_channels) for m in convolutions] == [
        (5, 192), (1, 160), (1, 96), (5, 192), (1, 192), (1, 192), (3, 192), (1, 192), (1, 10),
    ]  # fmt: skip
    assert [type(layer).__name__ for layer in network][:6] == ["NiNBlock", "MaxPool2d", "Dropout"] * 2
    # Of CIFAR-10's three colors it has 967k parameters; gray images need 2 * 25 * 192 fewer.
    assert sum(p.numel() for p in network.parameters()) == 966_986 - 9_600


def test_final_relu_and_norm_and_head() -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 1, 67, 67)
    assert NiN()(images).min() >= 0
    assert NiN(final_relu=False)(images).min() < 0
    assert sum(isinstance(m, nn.BatchNorm2d) for m in NiN(norm="batch").modules()) == 12
    assert not any(isinstance(m, nn.Linear) for m in NiN().modules())
    head = NiN(head="fc", image_size=67)
    assert head(images).shape == (4, 10)
    assert head[-1].weight.shape == (10, 10)
    with torch.device("meta"):
        assert NiN(head="fc")[-1].weight.shape == (10, 250)


@pytest.mark.parametrize(
    ("init", "deviation"),
    [
        ("xavier_uniform", (2 / (9 * 64 + 9 * 96)) ** 0.5),
        ("kaiming_normal", (2 / (9 * 64)) ** 0.5),
        ("torch", (1 / (3 * 9 * 64)) ** 0.5),
    ],
)
def test_starting_weights_have_their_spread(init: str, deviation: float) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 96, 3)
    initialize(layer, init)
    assert float(layer.weight.detach().std()) == pytest.approx(deviation, rel=0.02)
    assert bool((layer.bias == 0).all()) == (init == "kaiming_normal")


@pytest.mark.parametrize("head", ["gap", "fc"])
@pytest.mark.parametrize("seed", range(5))
def test_every_class_map_starts_positive_and_has_gradients_with_kaiming_dirac(seed: int, head: str) -> None:
    torch.manual_seed(seed)
    network, images = NiN(image_size=67, head=head), torch.rand(8, 1, 67, 67)
    random_state = torch.get_rng_state()
    initialize(network, "kaiming_dirac")
    identities = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(identities) == 8
    for layer in identities:
        assert torch.equal(layer.weight.detach()[:, :, 0, 0], torch.eye(layer.out_channels))
        assert not layer.bias.any()
    first, drawn = network[0][0].weight, network[7][0]
    torch.set_rng_state(random_state)
    assert torch.equal(first.detach(), torch.empty_like(first).normal_(0, (2 / 121) ** 0.5))  # the first that is drawn
    assert float(drawn.weight.detach().std()) == pytest.approx(0.3 * (2 / (9 * 384)) ** 0.5, rel=0.02)
    assert drawn.bias.tolist() == [1.0] * 10
    maps = network.eval()[:8](images)
    assert bool((maps > 0).all())
    for gradient in (torch.autograd.grad(maps[:, i].sum(), first, retain_graph=True)[0] for i in range(10)):
        assert gradient.any()
    if head == "fc":
        assert torch.equal(network[-1].weight.detach(), torch.eye(10))  # the average of a 1x1 map
        assert not network[-1].bias.any()


def test_kaiming_dirac_is_kaiming_normal_in_a_network_without_class_maps() -> None:
    states = []
    for init in ("kaiming_dirac", "kaiming_normal"):
        torch.manual_seed(0)
        network = NiN(widths=[4, 8], kernel_sizes=[3, 3, 3], image_size=28, head="mlp", head_width=8, conv1x1_layers=0)
        initialize(network, init)
        states.append(network.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(*(s.values() for s in states), strict=True))


def test_the_fully_connected_head_takes_the_features_of_the_last_pooling() -> None:
    with torch.device("meta"):
        network = NiN(head="mlp")
        assert network(torch.zeros(2, 1, 224, 224)).shape == (2, 10)
        between = NiN(head="mlp", dropout_between=True)
    assert [type(layer).__name__ for layer in network] == [
        "NiNBlock", "MaxPool2d", "NiNBlock", "MaxPool2d", "NiNBlock", "MaxPool2d",
        "Flatten", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear",
    ]  # fmt: skip
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (384 * 5 * 5, 4096), (4096, 4096), (4096, 10),
    ]  # fmt: skip
    assert [type(layer).__name__ for layer in between][:6] == ["NiNBlock", "MaxPool2d", "Dropout"] * 2
    assert [layer.out_features for layer in NiN(head="mlp", head_width=8, image_size=67) if isinstance(layer, nn.Linear)
            ] == [8, 8, 10]  # fmt: skip


def test_conv1x1_relu_is_the_relu_after_each_1x1_convolution() -> None:
    def followed(network: NiN) -> list[tuple[int, bool]]:
        """The kernel size of each convolution and whether a ReLU follows it."""
        layers = [layer for block in network if isinstance(block, nn.Sequential) for layer in [*block, nn.Identity()]]
        pairs = pairwise(layers)
        return [(a.kernel_size[0], isinstance(b, nn.ReLU)) for a, b in pairs if isinstance(a, nn.Conv2d)]

    with torch.device("meta"):
        assert followed(NiN(conv1x1_relu=False)) == [
            (kernel, kernel != 1) for kernel in (11, 1, 1, 5, 1, 1, 3, 1, 1, 3, 1, 1)
        ]
        assert all(relu for _, relu in followed(NiN()))
        # Without 1x1 convolutions the score maps are those of the last block's convolution.
        assert followed(NiN(conv1x1_relu=False, conv1x1_layers=0))[-1] == (3, True)
        assert followed(NiN(final_relu=False))[-2:] == [(1, True), (1, False)]


def test_slices_are_plain_sequential_modules_that_share_the_layers() -> None:
    network, images = NiN(image_size=67).eval(), torch.rand(2, 1, 67, 67)
    features, head = network[:8], network[8:]
    assert type(features) is nn.Sequential
    assert list(dict(head.named_children())) == ["8", "9"]
    assert features[0] is network[0]
    assert torch.equal(head(features(images)), network(images))
    assert type(network[0][:2]) is nn.Sequential
    with torch.device("meta"):
        assert [type(layer).__name__ for layer in AlexNet()[-3:]] == ["ReLU", "Dropout", "Linear"]


@pytest.mark.parametrize("head", ["gap", "fc", "mlp"])
def test_the_block_with_the_class_maps_is_the_one_that_starts_near_one(head: str) -> None:
    overrides = [f"model.head={head}", "model.init=kaiming_dirac", "data.image_size=67", "model.head_width=8"]
    network = build_network(compose_settings(overrides), in_channels=1, num_classes=10)
    blocks = [layer for layer in network if isinstance(layer, NiNBlock)]
    ones = [bool(block[0].bias.detach().eq(1).all()) for block in blocks]
    assert ones == ([False, False, False] if head == "mlp" else [False, False, False, True])


def test_kaiming_dirac_starts_a_fully_connected_layer_on_the_maps_as_their_average() -> None:
    overrides = ["data.image_size=99", "model.init=kaiming_dirac", "model.head=fc"]
    network = build_network(compose_settings(overrides), in_channels=1, num_classes=10).eval()
    images = torch.rand(4, 1, 99, 99)
    maps = network[:-2](images)
    assert maps.shape == (4, 10, 2, 2)  # of several pixels: the order of the weights matters
    assert torch.allclose(network(images), maps.mean((2, 3)), rtol=1e-5)


def test_an_unknown_init_is_refused() -> None:
    with pytest.raises(ValueError, match="init='lecun'"):
        initialize(nn.Linear(2, 2), "lecun")
